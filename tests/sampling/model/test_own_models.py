"""Stored models of somebody else's code: never a reason to import it; opened where it was brought; changes are said."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import UserError
from scoreray.data.own_code import code_hash, name_in_command
from scoreray.data.packing.pack import pack
from scoreray.data.storage.store import open_store
from scoreray.sampling.http.parse import parse
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.offline.job import begin
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.samplers import sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.sampling.service.body import make_request
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.models import look_up
from scoreray.trainer.checkpoints.checkpoint import MARKER, find
from scoreray.trainer.checkpoints.exported import MODEL_JSON, ModelManifest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.run_folder import stored_config

NETWORK = """
import pathlib
import torch
pathlib.Path(__file__).with_name("imported").touch()

class Net(torch.nn.Module):
    def __init__(self, shape, width: int = 4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))

    def forward(self, x, c_noise, condition=None):
        return self.layers(x)
"""
SAMPLER = """
from typing import Annotated
from scoreray.sampling.samplers.options import Range

def halves(x, sigmas, noise, *, share: Annotated[float, Range(0.0, 1.0)] = 0.5):
    for sigma, after in zip(sigmas, sigmas[1:]):
        denoised = yield x, sigma
        x = denoised + (x - denoised) * (after / sigma)
    return x

def no_generator(x, sigmas, noise):
    return x

def no_range(x, sigmas, noise, *, share: float = 0.5):
    yield x, 1.0

def no_default(x, sigmas, noise, *, share: Annotated[float, Range(0.0, 1.0)]):
    yield x, 1.0

def odd(x, sigmas, noise, *, share: "Absent" = 1):
    yield x, 1.0
"""


def hostile(kind: str, url: str) -> str:
    """The run at a URL, whose checkpoint and config name this network."""
    checkpoint = find(url)
    config = {**checkpoint.marker.config, "network": {"kind": kind}}
    marker = replace(checkpoint.marker, config=config, own_code={kind: "0" * 64})
    open_store(url).put(f"{checkpoint.folder}/{MARKER}", marker.to_json())
    open_store(url).put("config.yaml", yaml.safe_dump(config).encode())
    return url


@pytest.mark.parametrize("kind", ["os:system", "beside.net:Net", "beside:Net"])
def test_a_stored_model_that_names_code_is_one_line_and_imports_nothing(
    kind: str, new_run: Callable[..., str], own_package: Callable[..., Path], tmp_path: Path
) -> None:
    folder = own_package("beside", brought=False, net=NETWORK)
    sys.path.insert(0, str(folder.parent))
    try:
        url = hostile(kind, new_run(str(tmp_path / "run"), shape=(2,)))
        export(new_run(str(tmp_path / "good"), shape=(2,)), str(tmp_path / "model"))
        page = ModelManifest.from_json((tmp_path / "model" / MODEL_JSON).read_bytes(), "model")
        (tmp_path / "model" / MODEL_JSON).write_bytes(replace(page, config=find(url).marker.config).to_json())
        package = kind.partition(":")[0].partition(".")[0]
        for open_it in (
            lambda: describe(url),
            lambda: load(find(url).url),
            lambda: load(str(tmp_path / "model")),
            lambda: look_up("m", url),
            lambda: stored_config(open_store(url)),
        ):
            with pytest.raises(UserError, match=rf"'{kind}' is code of somebody else's.*--with {package} ") as refused:
                open_it()
            assert "\n" not in str(refused.value)
            assert str(refused.value).startswith(str(tmp_path))
        assert not (folder / "imported").exists()
        assert "beside" not in sys.modules
    finally:
        sys.path.remove(str(folder.parent))


def test_a_data_set_that_names_code_imports_nothing(
    own_package: Callable[..., Path], small_run: Any, tmp_path: Path
) -> None:
    folder = own_package("beside", brought=False, net=NETWORK)
    sys.path.insert(0, str(folder.parent))
    try:
        points = np.zeros((64, 2), np.float32)
        points[::2] = 1
        np.savez(tmp_path / "x.npz", images=points, labels=np.arange(64) % 2, classes=["beside.net:Net", "os:system"])
        manifest = pack(tmp_path / "x.npz", tmp_path / "data", name="beside.net:Net")
        assert "beside.net:Net" in manifest.classes
        settings = small_run("run", tmp_path / "runs", 64, network={"kind": "mlp"})
        check_run(load_config({**settings, "data": {"url": str(tmp_path / "data"), "global_batch_size": 16}}))
        assert "beside" not in sys.modules
    finally:
        sys.path.remove(str(folder.parent))


def test_a_run_of_an_own_network_is_opened_exported_and_resumed_and_a_change_of_its_code_is_said(
    own_package: Callable[..., Path], small_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = own_package("theirs", net=NETWORK)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", images=rng.standard_normal((64, 2)).astype(np.float32))
    pack(tmp_path / "x.npz", tmp_path / "data")
    settings = small_run("run", tmp_path / "runs", 32, network={"kind": "theirs.net:Net", "width": 6})
    settings["data"] = {"url": str(tmp_path / "data"), "global_batch_size": 16}
    config = prepare_run(load_config(settings)).config
    train(config, rank=0, world_size=1, device=torch.device("cpu"))
    url = str(tmp_path / "runs" / "run")
    recorded = {"theirs.net:Net": code_hash("theirs.net:Net")}
    assert find(url).marker.own_code == recorded
    export(url, str(tmp_path / "model"))
    for format, before in (("scoreray", "--with "), ("diffusers", "SCORERAY_WITH=")):
        exported = export_model(url, str(tmp_path / format), ["none"], ExportOptions(format))
        assert f"{before}{folder}" in exported.text(), "the command that follows works as it is printed"
        card = (tmp_path / format / "README.md").read_text()
        assert f"{before}theirs" in card
        assert str(folder) not in card
    assert json.loads((tmp_path / "model" / MODEL_JSON).read_bytes())["own_code"] == recorded
    x = torch.randn(3, 2)
    first = load(url)
    assert torch.equal(first(x, 1.0), load(str(tmp_path / "model"))(x, 1.0))
    assert first.info.config.network.width == 6  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING, "scoreray"):
        describe(url)
        assert not caplog.records
        (folder / "net.py").write_text(NETWORK + "\n# changed\n")
        code_hash.cache_clear()
        describe(url)
        describe(url)
        prepare_run(load_config({**settings, "duration": {"images": 64}}))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines  # once for the run's URL, once for the checkpoint that is resumed
    for line in lines:
        assert "the code of 'theirs.net:Net' has changed since it was stored (SHA-256 " in line
    train(prepare_run(load_config({**settings, "duration": {"images": 64}})).config, rank=0, world_size=1,
          device=torch.device("cpu"))  # fmt: skip
    assert find(url).images_seen == 64


def test_an_own_sampler_is_a_generator_with_options(
    own_package: Callable[..., Path], new_run: Any, tmp_path: Path
) -> None:
    own_package("theirs", way=SAMPLER)
    x, denoiser = torch.randn(4, 2) * 80, lambda x, sigma: x / (1 + sigma[:, None] ** 2)
    found = sample(denoiser, x, karras(5), sampler="theirs.way:halves", share=0.25)
    assert torch.allclose(found, sample(denoiser, x, karras(5), sampler="euler"), atol=1e-5)
    for name, message in (
        ("theirs.way:no_generator", "is no generator function"),
        ("theirs.way:no_range", "option 'share' needs a default, and a number a Range"),
        ("theirs.way:no_default", "option 'share' needs a default"),
        ("theirs.way:odd", "its options can't be read from its signature: NameError"),
        ("os:system", "is code of somebody else's"),
        ("huen", "did you mean 'heun'"),
    ):
        with pytest.raises(UserError, match=message):
            sample(denoiser, x, karras(5), sampler=name)
    with pytest.raises(UserError, match=r"'theirs\.way:halves' has no option 'shore': did you mean 'share'"):
        Request(1, sampler="theirs.way:halves", options={"shore": 1})


def test_samples_of_a_sampler_whose_code_has_changed_are_another_request_s(
    own_package: Callable[..., Path], new_run: Callable[..., str], tmp_path: Path
) -> None:
    folder = own_package("theirs", way=SAMPLER)
    url, place = new_run(str(tmp_path / "run"), shape=(2,), classes=0), place_of(str(tmp_path / "drawn.npz"))
    request = Request(2, sampler="theirs.way:halves", steps=3)
    job, *_ = begin(place, url, None, request)
    assert job.own_code == {"theirs.way:halves": code_hash("theirs.way:halves")}
    assert begin(place, url, None, request)[0] == job
    (folder / "way.py").write_text(SAMPLER + "\n# otherwise")
    code_hash.cache_clear()
    with pytest.raises(UserError, match=r"samples of another request are there \(own_code "):
        begin(place, url, None, request)


def test_a_request_over_http_names_no_code_but_what_the_service_was_given(
    own_package: Callable[..., Path], new_run: Callable[..., str], tmp_path: Path
) -> None:
    own_package("theirs", way=SAMPLER, other=NETWORK)
    url = new_run(str(tmp_path / "run"), shape=(2,), classes=0)
    body = {"count": 1, "sampler": "theirs.way:halves", "steps": 5, "options": {"share": 0.25}}

    def answer(samplers: tuple[str, ...], sampler: str) -> Any:
        parsed = parse(json.dumps({**body, "sampler": sampler}).encode())
        return make_request(parsed, look_up("m", url, samplers=samplers), Limits(), "application/json", 0)

    for samplers, sampler in (
        ((), "theirs.way:halves"), ((), "os:system"), (("theirs.way:halves",), "theirs.other:Net"),
    ):  # fmt: skip
        with pytest.raises(Refused, match="unknown sampler"):
            answer(samplers, sampler)
    assert "theirs.other" not in sys.modules
    assert answer(("theirs.way:halves",), "theirs.way:halves").expected_calls == 5
    page = look_up("m", url, samplers=("theirs.way:halves",)).page(Limits())
    assert page["samplers"]["theirs.way:halves"]["share"]["default"] == 0.5
    assert name_in_command("theirs.way:halves") == "theirs.way:halves"
