"""Runs that begin from another model: what it gives, bit by bit, whatever is new; what does not fit is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.cluster.doctor.examine import initial
from scoreray.cluster.verbs.status import status_of
from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.trainer import loop
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.exported import find_exported
from scoreray.trainer.checkpoints.posthoc import Mix, reconstruct
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.config.sections import InitSection
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.diffusion.condition_shapes import example_condition
from scoreray.trainer.initial import Growth, InitialWeights, _of_classes, _of_grids, begin
from scoreray.trainer.loop import train
from scoreray.trainer.optim.fragments import MASTER
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.run_data import open_run_data
from scoreray.trainer.run_folder import run_store
from scoreray.tune.load import check_sweep, load_sweep

SmallRun = Callable[..., dict[str, Any]]
SMALL_TEXT = {"hidden_size": 8, "depth": 1, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "text_encoder": SMALL_TEXT},
    "dit": {"kind": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "text_encoder": SMALL_TEXT},
    "mlp": {"kind": "mlp", "hidden_size": 16, "num_layers": 1, "text_encoder": SMALL_TEXT},
}


def begun(config: Config) -> tuple[Any, Any]:
    """(module, engine) of a run before its first step."""
    config = check_and_settle(config)
    fields = run_fields(config.data, open_run_data(config))
    module, engine = loop._build(config, fields, 1, torch.device("cpu"), lambda line: None)
    begin(config, fields, engine, module, 0, 1)
    return module.eval(), engine


def check_and_settle(config: Config) -> Config:
    return prepare_run(config).config


def trained(settings: dict[str, Any], *overrides: str) -> Config:
    config = prepare_run(load_config(settings, overrides)).config
    train(config)
    return config


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("before", ["none", "label"])
def test_new_conditions_change_no_bit(
    small_run: SmallRun, conditioned_set: str, conditions: dict[str, Any], tmp_path: Path, kind: str, before: str
) -> None:
    """Of every kind at once, a flow map's level too: neither without a value nor, before the first step, with one."""
    known = {"label": conditions["label"]} if before == "label" else {}
    sections = {
        "data": {"url": conditioned_set, "global_batch_size": 16, "conditions": known},
        "network": NETWORKS[kind],
        "optimizer": {"learning_rate": 0.1},
    }
    base = trained(small_run("base", tmp_path, 32, **sections))
    url = run_store(base).url()
    sections["data"] = {**sections["data"], "conditions": conditions}
    sections["objective"] = {"kind": "mean_flow"}
    module, engine = begun(load_config(small_run("tuned", tmp_path, 32, **sections, init={"checkpoint": url})))
    model = load(url, device="cpu")
    everything = example_condition(module.conditions, 4)
    assert everything is not None
    x, sigma = torch.randn(4, 2, 8, 8), torch.tensor([0.01, 0.5, 3.0, 40.0])
    label = everything.select(known)
    with torch.no_grad():
        expected = model(x, sigma, label)
        assert expected.isfinite().all()
        assert not torch.equal(expected, model(2 * x, sigma, label))
        assert torch.equal(module.denoiser(x, sigma, label), expected)
        given = everything if known else everything.drop({"label": torch.ones(4, dtype=torch.bool)})
        assert torch.equal(module.denoiser(x, sigma, given), expected)
    for fragment in engine.fragments():
        assert torch.equal(fragment.tensors["ema_0.050"], fragment.tensors[MASTER])
        assert not fragment.tensors["exp_avg"].any()


def test_tokens_beside_others_are_noted_where_blocks_attend_to_them(
    small_run: SmallRun, conditioned_set: str, conditions: dict[str, Any], tmp_path: Path
) -> None:
    """Their null token joins the others', so that the first output is not the other model's."""
    for kind in ("dit", "mlp"):
        data = {"url": conditioned_set, "global_batch_size": 16, "conditions": {"text": {}}}
        base = trained(small_run(kind, tmp_path, 16, data=data, network=NETWORKS[kind]))
        data["conditions"] = {"text": {}, "t5": conditions["t5"]}
        settings = small_run("tuned", tmp_path, 16, data=data, network=NETWORKS[kind])
        (note,) = check_run(load_config({**settings, "init": {"checkpoint": run_store(base).url()}})).notes
        assert "; new: condition 't5' (sequence)" in note
        assert ("the null token of 't5', which blocks attend to beside 'text'" in note) is (kind == "dit")


def pictures(folder: Path, *shape: int, classes: int) -> str:
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(folder / "p.npz", images=images, labels=np.arange(len(images)) % classes)
    pack(str(folder / "p.npz"), str(folder / "packed"))
    return str(folder / "packed")


@pytest.fixture(scope="module")
def base(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps on grey pictures of 3 classes."""
    settings = small_run("base", tmp_path_factory.mktemp("base"), 32, optimizer={"learning_rate": 0.1})
    return trained(settings)


def on(base: Config, storage: Path, *overrides: str) -> Config:
    """A run like the base's that begins from it."""
    begin_from = f"init={{checkpoint: {run_store(base).url()}}}"
    names = [f"run={{name: tuned, storage: {storage}}}", begin_from]
    return load_config(base.model_dump(mode="json"), [*names, *overrides])


@pytest.mark.parametrize("exported", [False, True], ids=["run", "exported"])
def test_new_classes_begin_as_the_null_class(base: Config, tmp_path: Path, exported: bool) -> None:
    url = run_store(base).url()
    if exported:
        export(url, str(tmp_path / "model"))
    data = pictures(tmp_path / "more", 64, 8, 8, classes=5)
    init = f"init.checkpoint={tmp_path / 'model'}" if exported else "init.ema=0.05"
    config = on(base, tmp_path, f"data.url={data}", init)
    (note,) = check_run(config).notes
    assert note.endswith("at 32 images, EMA 0.050; new: classes of 'label': 3, 4")
    module, _ = begun(config)
    model = load(url, "0.05", device="cpu")
    x, sigma, labels = torch.randn(6, 1, 8, 8), torch.full((6,), 0.7), torch.tensor([0, 1, 2, 3, 4, -1])
    with torch.no_grad():
        old, new = model(x, sigma, labels.masked_fill(labels > 2, -1)), module.denoiser(x, sigma, labels)
    assert torch.equal(old, new)
    assert not torch.equal(old, model(x, sigma, torch.full((6,), -1)))


COUNTING = """
import torch
from torch import nn

class Counting(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, c_noise, condition=None):
        self.calls += self.training
        return self.scale * x
"""


@pytest.mark.parametrize("exported", [False, True], ids=["run", "exported"])
def test_buffers_are_taken_too(
    own_package: Callable[..., Path], small_run: SmallRun, tmp_path: Path, exported: bool
) -> None:
    own_package("theirs", net=COUNTING)
    run = trained(small_run("base", tmp_path, 32, network={"kind": "theirs.net:Counting"}))
    if exported:
        export(run_store(run).url(), str(tmp_path / "model"))
    config = on(run, tmp_path, *([f"init.checkpoint={tmp_path / 'model'}"] if exported else []))
    module, _ = begun(config)
    calls = load(run_store(run).url(), device="cpu").network.calls
    assert module.denoiser.network.calls == calls >= 2


def test_further_channels_are_neither_read_nor_written(base: Config, tmp_path: Path) -> None:
    data = pictures(tmp_path / "colour", 64, 8, 8, 3, classes=3)
    config = on(base, tmp_path, f"data.url={data}", "init.ema=weights")
    assert "new: channels 1 to 2" in check_run(config).notes[0]
    module, _ = begun(config)
    x, sigma, labels = torch.randn(4, 3, 8, 8), torch.full((4,), 0.7), torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        old = load(run_store(base).url(), "none", device="cpu")(x[:, :1], sigma, labels)
        new = module.denoiser(x, sigma, labels)
        nothing = module.denoiser(torch.cat([0 * x[:, :1], x[:, 1:]], 1), sigma, labels)
    torch.testing.assert_close(new[:, :1], old)
    assert torch.equal(new[:, 1:], nothing[:, 1:])


def test_grown_tensors_take_entries_by_name() -> None:
    """Of classes in another order, and of grids, each of which has its channels and one more, two entries a channel."""
    stored = torch.arange(6.0).view(3, 2)
    assert Growth(0, (0, 2, 0)).apply(stored).tolist() == [[0, 1], [4, 5], [0, 1]]
    assert Growth(1, (-1, 1, 0)).apply(stored).tolist() == [[0, 1, 0], [0, 3, 2], [0, 5, 4]]
    two, one = ConditionSpec("concat", (2, 4, 4)), ConditionSpec("concat", (1, 4, 4))
    assert _of_grids(10, {"b": one}, {"a": two, "b": one}) == Growth(1, (*(-1,) * 6, 0, 1, 2, 3))
    found = InitialWeights()
    assert _of_classes(found, "label", ["cat", "dog"], ["eel", "dog"]) == Growth(0, (0, 0, 2))
    assert (found.notes, found.misfits) == (["classes of 'label': eel"], ["the data lack classes of 'label': cat"])


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["network.model_channels=16"],
            [
                "network.model_channels is 8 there, 16 here",
                "71 tensors of another shape: embedding.noise_in.weight [32, 8], here [",
            ],
        ),
        (["network.num_blocks=2"], ["num_blocks is 1 there, 2 here", "22 tensors missing: down.1.norm_in.weight, "]),
        (["denoiser.sigma_data=0.7"], ["denoiser.sigma_data is 0.5 there, 0.7 here"]),
        (["data.conditions={}"], ["1 tensor further: embedding.classes.weight"]),
        (["init.ema=0.2"], ["init.checkpoint: EMA length '0.2'", "0.050, 0.100, none"]),
        (["init.checkpoint=nowhere"], ["init.checkpoint: nowhere: neither a run"]),
        (["network={kind: mlp}"], ["nothing of it fits this network: network.kind is 'unet' there, 'mlp' here"]),
    ],
)
def test_what_does_not_fit_is_one_line(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], messages: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        check_run(on(base, tmp_path, *overrides))
    (line,) = str(refused.value).splitlines()
    assert line.startswith("init.checkpoint: ")
    assert all(message in line for message in messages), line
    assert len(line) < 2000
    config = on(base, tmp_path, *overrides)
    (finding,) = initial(config, run_fields(config.data, open_run_data(config)))
    assert (finding.state, finding.text) == ("problem", line)


def test_not_strict_takes_what_fits_and_lists_the_rest(base: Config, tmp_path: Path) -> None:
    config = on(base, tmp_path, "network.num_blocks=2", "data.conditions={}", "init.strict=false")
    (note,) = check_run(config).notes
    assert "left out: network.num_blocks is 1 there, 2 here; " in note
    assert "1 tensor further: embedding.classes.weight" in note
    module, _ = begun(config)
    stored = latest(run_store(base))
    assert stored is not None
    assert torch.equal(
        module.denoiser.network.conv_in.weight, stored.full_state("ema_0.050")["denoiser.network.conv_in.weight"]
    )


def test_the_lineage_is_kept_and_init_is_read_once(base: Config, small_set: str, tmp_path: Path) -> None:
    """A run goes on without what it began from; its own successor, from the exported model, knows both."""
    shutil.copytree(run_store(base).url(), tmp_path / "copy")
    config = on(base, tmp_path, f"init.checkpoint={tmp_path}/copy", "checkpoint.every_images=16")
    prepared = prepare_run(config)
    newest = latest(run_store(base))
    assert newest is not None
    assert prepared.config.init is not None
    assert prepared.config.init.checkpoint == f"{tmp_path}/copy/{newest.folder}"  # for all starts of this command
    train(prepared.config, requested=lambda: loop.LoopRequest.STOP)
    shutil.rmtree(tmp_path / "copy")
    again = prepare_run(config)
    assert not again.notes
    assert train(again.config) == 32
    url = run_store(config).url()
    status = status_of(url)
    (origin,) = status.lineage
    assert (origin.checkpoint, origin.ema, origin.images_seen) == (prepared.config.init.checkpoint, "0.050", 32)
    assert len(origin.sha256) == 64
    assert f"began from  {origin.text()}" in status.text()
    export(url, str(tmp_path / "model"))
    exported = find_exported(str(tmp_path / "model"))
    assert exported is not None
    assert exported.page.lineage == [origin]
    last = on(base, tmp_path / "last", f"init.checkpoint={tmp_path}/model", "run.name=last")
    train(prepare_run(last).config)
    assert [one.checkpoint for one in status_of(run_store(last).url()).lineage] == [
        str(tmp_path / "model"), origin.checkpoint,
    ]  # fmt: skip
    assert json.dumps(status.answer())


def test_a_sweep_searches_what_runs_begin_from(base: Config, small_set: str, tmp_path: Path) -> None:
    sweep = {
        "study": {"name": "s", "storage": str(tmp_path)},
        "base": on(base, tmp_path).model_dump(mode="json"),
        "metric": {"reference": small_set},
        "space": {"init.ema": {"choice": [0.05, "weights"]}, "optimizer.frozen": {"choice": [[], ["middle.*"]]}},
    }
    plan = load_sweep(sweep)
    check_sweep(plan)
    assert plan.config({"init.ema": 0.05}).init == InitSection(checkpoint=run_store(base).url(), ema="0.05")
    with pytest.raises(UserError, match=r"^space: at init\.ema=0\.2: init\.checkpoint: EMA length '0\.2'"):
        check_sweep(load_sweep({**sweep, "space": {"init.ema": {"choice": [0.2, "weights"]}}}))
    with pytest.raises(UserError, match=r"init\.checkpoint: missing"):
        load_sweep(sweep, ["base.init=null"])


def test_sigma_data_auto_is_that_of_the_weights(base: Config, tmp_path: Path) -> None:
    prepared = prepare_run(on(base, tmp_path, "denoiser.sigma_data=auto"))
    assert prepared.config.denoiser.sigma_data == 0.5


def test_frozen_parameters_stay_and_are_whole_in_checkpoints(base: Config, tmp_path: Path) -> None:
    """Also in bf16, where the network computes with rounded ones; no moments, no averages; the rest trains."""
    stored = latest(run_store(base))
    assert stored is not None
    for precision in ("fp32", "bf16"):
        config = on(
            base, tmp_path / precision, f"engine.precision={precision}", 'optimizer.frozen=["*", "!embedding.*"]',
            "checkpoint.snapshot_every_images=16",
        )  # fmt: skip
        train(prepare_run(config).config)
        newest = latest(run_store(config))
        assert newest is not None
        mixed = reconstruct(newest, Mix([(newest, {"ema_0.050": 0.5, "ema_0.100": 0.6})], 0.0))
        keys = {key for file in newest.marker.files for key in tensors_of(newest, file)}
        assert {key.partition("/")[0] for key in keys if "conv_in" in key} == {MASTER}
        before, after, average = stored.full_state("ema_0.050"), newest.full_state(), newest.full_state("ema_0.050")
        for name, values in before.items():
            changed = name.startswith("denoiser.network.embedding.")
            assert torch.equal(after[name], values) is not changed, name
            assert changed or torch.equal(average[name], values), name
            assert changed or torch.equal(mixed[name], values), name  # whatever factors of averages add up to
        assert status_of(run_store(config).url()).frozen == [n for n in before if ".embedding." not in n]


def tensors_of(checkpoint: Any, file: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(f"{checkpoint.url}/{file}", "pt") as tensors:
        return list(tensors.keys())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ('["conv_in.wieght"]', "'conv_in.wieght' fits no parameter of the network; did you mean 'conv_in.weight'"),
        ('["*"]', "leaves no parameter to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(
    base: Config, tmp_path: Path, patterns: str, message: str
) -> None:
    with pytest.raises(UserError, match=r"^optimizer\.frozen: ") as refused:
        check_run(on(base, tmp_path, f"optimizer.frozen={patterns}"))
    assert message in str(refused.value)
