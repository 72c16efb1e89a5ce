"""LoRA: adapters alone are trained and stored, beside a base that keeps its bits; what does not fit it is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, generate
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.networks.lora import stored_adapters
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.run_folder import run_store

SmallRun = Callable[..., dict[str, Any]]
RATE = {"learning_rate": 0.1}


def trained(settings: dict[str, Any], *overrides: str) -> Config:
    config = prepare_run(load_config(settings, overrides)).config
    train(config)
    return config


def newest(config: Config) -> Checkpoint:
    found = latest(run_store(config))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def base(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps."""
    return trained(small_run("base", tmp_path_factory.mktemp("base"), 32, optimizer=RATE))


def lora_of(base: Config, storage: Path, *overrides: str) -> Config:
    """A run of two steps that adapts the base's attention."""
    sections = [
        f"run={{name: lora, storage: {storage}}}",
        f"init={{checkpoint: {run_store(base).url()}}}",
        "lora={rank: 2, dropout: 0.2}",
        "checkpoint.every_images=16",
    ]
    return load_config(base.model_dump(mode="json"), [*sections, *overrides])


@pytest.fixture(scope="module")
def tuned(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return trained(lora_of(base, tmp_path_factory.mktemp("lora")).model_dump(mode="json"))


def test_adapters_alone_are_trained_and_stored(base: Config, tuned: Config) -> None:
    """What a checkpoint holds is the adapters, their averages and moments, and which model they belong to."""
    stored, adapted = newest(tuned), newest(base)
    assert {name.rpartition(".lora_")[2] for name in stored.marker.shapes} == {"A.default.weight", "B.default.weight"}
    assert stored.marker.frozen == []
    assert stored.marker.lineage[0].checkpoint == adapted.url
    num_bytes = [sum(file.bytes for file in one.marker.files.values()) for one in (stored, adapted)]
    assert num_bytes[0] < num_bytes[1] / 4
    state = stored.full_state("ema_0.050")
    assert all(bool(value.any()) for value in state.values())
    assert not torch.equal(next(iter(state.values())), next(iter(stored.full_state().values())))


def test_what_is_loaded_is_the_base_with_the_adapters_products_added(base: Config, tuned: Config) -> None:
    model, before = (load(run_store(one).url(), device="cpu").network.state_dict() for one in (tuned, base))
    adapters = stored_adapters(newest(tuned).full_state("ema_0.050"))
    changed = 0
    for name, weight in model.items():
        path = f"denoiser.network.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in adapters:
            product = adapters[f"{path}.lora_B.weight"] @ adapters[f"{path}.lora_A.weight"]
            torch.testing.assert_close(weight, before[name] + product)
            changed += 1
        else:
            assert torch.equal(weight, before[name])
    assert changed == len(adapters) / 2 > 0


def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(
    base: Config, tuned: Config, tmp_path: Path
) -> None:
    """Also where the run that it adapts has gone on since: the checkpoint that it began from counts."""
    copy = tmp_path / "base"
    shutil.copytree(run_store(base).url(), copy)
    begin_from = f"init={{checkpoint: {copy}}}"
    first = lora_of(base, tmp_path, begin_from)
    trained(first.model_dump(mode="json"), "duration.images=16")
    trained(base.model_dump(mode="json"), f"run={{name: base, storage: {tmp_path}}}", "duration.images=48")
    (tmp_path / "lora" / "config.yaml").unlink()  # of 16 images
    trained(first.model_dump(mode="json"))
    for key in ("master", "exp_avg", "ema_0.050"):
        state, expected = newest(first).full_state(key), newest(tuned).full_state(key)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_an_export_is_whole(base: Config, tuned: Config, tmp_path: Path) -> None:
    """And needs neither the base nor peft: its config has no LoRA any more, its lineage has the base."""
    export(run_store(tuned).url(), str(tmp_path / "whole"))
    page = json.loads((tmp_path / "whole" / "model.json").read_text())
    assert page["config"]["lora"] is None
    assert page["lineage"][0]["checkpoint"] == newest(base).url
    x, sigma = torch.randn(3, *page["image_shape"]), torch.tensor([0.1, 1.0, 10.0])
    whole, adapted = (load(url, device="cpu") for url in (str(tmp_path / "whole"), run_store(tuned).url()))
    assert torch.equal(whole(x, sigma), adapted(x, sigma))


def test_a_base_that_is_gone_or_another_is_a_line(base: Config, tmp_path: Path) -> None:
    shutil.copytree(newest(base).url, tmp_path / "base")
    config = trained(lora_of(base, tmp_path, f"init.checkpoint={tmp_path}/base").model_dump(mode="json"))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"lora/checkpoints/\S+: a LoRA of {tmp_path}/base at 32 images"):
        load(run_store(config).url())
    export(run_store(base).url(), str(tmp_path / "base"))
    assert load(run_store(config).url()).info.config.lora is not None  # of the same weights in another file
    export(run_store(config).url(), str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(UserError, match="a LoRA of another model"):
        load(run_store(config).url())
    with pytest.raises(UserError, match="a LoRA of another model"):
        train(config.model_copy(update={"duration": config.duration.model_copy(update={"images": 48})}))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["lora.rank=0"], "lora.rank is 0: give 1 or more"),
        (["lora.targets=[]"], "lora.targets: no layers; name some, or leave it out"),
        (["lora.targets=[attention.qvk]"], "lora.targets: 'attention.qvk' fits no layer of the network; did you mean"),
        (["init=null"], "lora: adapts the model that a run begins from; name it by init.checkpoint"),
        (["optimizer.frozen=['*']"], "optimizer.frozen: a LoRA leaves the whole network frozen; leave this out"),
    ],
)
def test_mistakes_are_a_line(base: Config, tmp_path: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        prepare_run(lora_of(base, tmp_path, *overrides))


def test_a_base_of_other_classes_is_a_line(base: Config, conditioned_set: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has to fit as it is|does not fit"):
        prepare_run(lora_of(base, tmp_path, f"data.url={conditioned_set}"))


def test_a_lora_learns_from_its_base_in_few_steps(base: Config, tmp_path: Path) -> None:
    url = run_store(base).url()
    objective = f"objective={{kind: consistency, stage_images: 16, num_stages: 2, teacher: {{checkpoint: {url}}}}}"
    student = newest(trained(lora_of(base, tmp_path, objective).model_dump(mode="json")))
    assert student.marker.is_lora
    assert student.marker.teacher is not None
    assert all(".lora_" in name and value.any() for name, value in student.full_state("master").items())
    model, plain = load(student.url, device="cpu"), load(url, device="cpu")
    assert model.info.map == "consistency"
    one, other = (next(iter(generate(m, Request(2, sampler=s)))) for m, s in ((model, None), (plain, "euler")))
    assert one[0].isfinite().all()
    assert not torch.equal(one[0], other[0])
    for few in (objective.replace("}}", ", guidance: [1, 3]}}"), "objective={kind: mean_flow}"):
        with pytest.raises(UserError, match="has to fit as it is, as its weights are not trained: condition '"):
            prepare_run(lora_of(base, tmp_path, few, "run.name=other"))
