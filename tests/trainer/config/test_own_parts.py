"""Parts of somebody else's in a config: keys, checks, overrides and comparisons as of ours; the same mathematics."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scoreray.data.errors import StorageError, UserError
from scoreray.data.own_code import gate, load, own_mistake, part
from scoreray.data.reading.manifest import Manifest
from scoreray.trainer import dry_run
from scoreray.trainer.config import Config, differing_keys, dump_config, load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.loop import train
from scoreray.trainer.meta import meta_module
from scoreray.trainer.networks.network import num_parameters
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.step import TrainingModule, build_training_module

NETWORK = """
import math
from dataclasses import dataclass, field
import torch
from pydantic import BaseModel, Field
from torch import nn

@dataclass(frozen=True)
class Block:
    width: int = 4

@dataclass(frozen=True)
class Net:
    width: int = 8
    gain: float = 1.0
    block: Block = Block()
    widths: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width {self.width}: choose 1 or more")

    def build(self, shape, conditions):
        return Module(shape, conditions, self.width)

class Model(BaseModel):
    width: int = Field(8, ge=1, le=64)

    def build(self, shape, conditions):
        return Module(shape, conditions, self.width)

class Module(nn.Module):
    def __init__(self, shape, conditions, width: int = 8):
        super().__init__()
        self.shape = tuple(shape)
        self.first = nn.Linear(math.prod(shape) + 1, width)
        self.classes = nn.Embedding(1 + sum(len(spec.classes) for spec in conditions.values()), width)
        self.last = nn.Linear(width, math.prod(shape))

    def forward(self, x, c_noise, condition=None):
        h = self.first(torch.cat([x.flatten(1), c_noise[:, None].to(x.dtype)], 1))
        if condition is not None:
            h = h + self.classes(condition.values["label"] + 1)
        return self.last(h.tanh()).view_as(x)

class WrongShape(Module):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x, c_noise, condition)[:, :, 1:]

class NoCondition(Module):
    def forward(self, x, c_noise):
        return x

class Looks(Module):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x if x.sum().item() > 0 else -x, c_noise, condition)

class LooksWrong(Looks):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x, c_noise, condition) + x[:, :, : 1 + int(x.sum().item() > 1e9)].repeat(1, 1, 3, 1)

class Wide(Module):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x, c_noise, condition).double()

class Whole(Module):
    def forward(self, x, c_noise, condition=None):
        return super().forward(x, c_noise, condition).long()

class InPlace(Module):
    def forward(self, x, c_noise, condition=None):
        h = self.first(torch.cat([x.flatten(1), c_noise[:, None]], 1)).tanh()
        out = self.last(h).view_as(x)
        h.zero_()
        return out

class Unused(Module):
    def forward(self, x, c_noise, condition=None):
        return x

class Late(Module):
    calls = 0

    def forward(self, x, c_noise, condition=None):
        Late.calls += 1
        if Late.calls > 3:
            raise ValueError("batch\\nnorm of %d" % len(x))
        return super().forward(x, c_noise, condition)

@dataclass(frozen=True)
class Broken:
    def build(self, shape, conditions):
        raise RuntimeError("no\\nway")

@dataclass(frozen=True)
class NoModule:
    def build(self, shape, conditions):
        return 3

class Plain:
    def build(self, shape, conditions):
        return None

def function():
    pass
"""
MATHS = """
from dataclasses import dataclass
import torch
from scoreray.trainer.objectives.base import BaseObjective
from scoreray.trainer.process import GaussianProcess

@dataclass(frozen=True)
class Process(GaussianProcess):
    most: float = 80.0

    def _alpha(self, t):
        return torch.ones_like(t)

    def _sigma(self, t):
        return 0.002 + t * (self.most - 0.002)

@dataclass(frozen=True)
class Weighting:
    power: float = 1.0

    def weight(self, sigma, process, sigma_data):
        return (sigma**-2 + sigma_data**-2) ** self.power

@dataclass(frozen=True)
class Sampling:
    mean: float = -1.2

    def quantile(self, u, process):
        return (self.mean + 1.2 * torch.special.ndtri(u)).exp()

@dataclass(frozen=True)
class Objective(BaseObjective):
    scale: float = 1.0

    def error(self, denoiser, batch):
        return self.scale * super().error(denoiser, batch)

@dataclass(frozen=True)
class Column(Weighting):
    def weight(self, sigma, process, sigma_data):
        return super().weight(sigma, process, sigma_data)[:, None]

@dataclass(frozen=True)
class Fails(Weighting):
    def weight(self, sigma, process, sigma_data):
        return sigma.reshape(7, 7)

@dataclass(frozen=True)
class Negative:
    def quantile(self, u, process):
        return -u

@dataclass(frozen=True)
class Total(BaseObjective):
    def error(self, denoiser, batch):
        return super().error(denoiser, batch).sum()

@dataclass(frozen=True)
class Encoder:
    size: int = 4

    def build(self, length, width, activation_checkpointing):
        return Reads(self.size, width)

class Reads(torch.nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(256, size), torch.nn.Linear(size, width)

    def forward(self, value, mask):
        return self.out(self.table(value.int()))
"""


@pytest.fixture
def config(own_package: Callable[..., Path], small_run: Any, tmp_path: Path) -> Callable[..., Config]:
    """config("network.width=3", ...) of a file whose network is `theirs.net:Net`, read as the command reads it."""
    own_package("theirs", net=NETWORK, maths=MATHS)
    settings = small_run("own", tmp_path / "runs", 64, network={"kind": "theirs.net:Net"})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    return lambda *overrides: load_config(tmp_path / "own.yaml", overrides)


def test_keys_defaults_and_overrides_are_those_of_the_class(config: Callable[..., Config]) -> None:
    made = config("network.width=3", "network.block.width=5", "network.widths=[4]")
    assert made.network.kind == "theirs.net:Net"
    assert (made.network.width, made.network.block.width, made.network.widths) == (3, 5, (4,))  # type: ignore[union-attr]
    assert not made.network.is_machine
    page = yaml.safe_load(dump_config(made))["network"]
    assert page == {"kind": "theirs.net:Net", "width": 3, "gain": 1.0, "block": {"width": 5}, "widths": [4]}
    assert load_config(made.model_dump(mode="json")) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert differing_keys(made, config("network.width=3", "network.widths=[4]")) == [
        "network.block.width: 5 in the run, 4 in this config"
    ]
    assert "network.kind" in " ".join(differing_keys(made, config("network.kind=mlp")))


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["network.widht=3"], ["network.widht: unknown key; did you mean 'width'? accepted: block, gain, width"]),
        (["network.block.widht=3"], ["network.block.widht: unknown key; did you mean 'width'? accepted: width"]),
        (["network.width=x", "network.gain=.inf", "optimizer.eps=x"],
         ["network.width: 'x' is not accepted", "network.gain: inf is not accepted", "optimizer.eps: 'x'"]),
        (["network.width=0"], ["network: width 0: choose 1 or more"]),
        (["network.kind=theirs.net:Model", "network.width=65"], ["network.width: 65 is not accepted; it should be"]),
        (["network.kind=theirs.net:Model", "network.wdth=5"], ["network.wdth: unknown key; did you mean 'width'?"]),
        (["network.kind=theirs.net:Module", "network.shape=[1]"], ["network.shape: unknown key; accepted: width"]),
        (["network.kind=theirs.net:Module", "network.width=1.5"], ["network.width: 1.5 is not accepted"]),
        (["network.kind=theirs.net:function"], ["network: kind 'theirs.net:function': is no network: a function"]),
        (["network.kind=theirs.net:Plain"], ["network: kind 'theirs.net:Plain': is the class Plain; a frozen"]),
        (["network.kind=theirs.net:Nett"], ["network: kind 'theirs.net:Nett': theirs.net has no 'Nett'; did you mean"]),
        (["process.kind=theirs.maths:Weighting"], ["process: kind 'theirs.maths:Weighting': is no process: the class"]),
        (["objective.weighting.kind=theirs.maths:Weighting", "objective.weighting.powr=2"],
         ["objective.weighting.powr: unknown key; did you mean 'power'?"]),
        (["objective.kind=theirs.maths:Objective", "objective.weighting.kind=min_snr", "objective.weighting.gama=2"],
         ["objective.weighting.gama: unknown key; did you mean 'gamma'?"]),
    ],
)  # fmt: skip
def test_every_mistake_is_a_line_with_its_key(
    config: Callable[..., Config], overrides: list[str], lines: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        config(*overrides)
    for line in lines:
        assert line in str(refused.value)
    assert len(str(refused.value).splitlines()) == (1 if len(lines) == 1 else 1 + len(lines))


def test_parameters_are_counted_and_a_network_knows_its_conditions(
    config: Callable[..., Config], small_set: str
) -> None:
    data = Manifest.at(small_set)
    width, size, classes = 8, 64, 3
    expected = (size + 1) * width + width + (1 + classes) * width + width * size + size
    for kind in ("Net", "Model", "Module"):
        made = config(f"network.kind=theirs.net:{kind}")
        module = meta_module(made, run_fields(made.data, data))
        assert num_parameters(module) == expected
        assert isinstance(module, TrainingModule)
        assert list(module.denoiser.conditions or {}) == ["label"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("WrongShape", r"kind 'theirs\.net:WrongShape': forward gave \[2, 1, 7, 8\] for x \[2, 1, 8, 8\]"),
        ("NoCondition", r"forward\(x \[2, 1, 8, 8\], c_noise, condition\) failed: TypeError"),
        ("Broken", "kind 'theirs.net:Broken': its build failed: RuntimeError: no way"),
        ("NoModule", "its build gave a int; a torch.nn.Module is needed"),
    ],
)
def test_a_network_that_can_not_work_is_refused_before_anything_starts(
    config: Callable[..., Config], kind: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_run(config(f"network.kind=theirs.net:{kind}"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.kind=theirs.net:LooksWrong", r"kind 'theirs\.net:LooksWrong' failed: RuntimeError: The size of "
         r"tensor a \(8\) must match .* \(theirs/net\.py:\d+\)$"),
        ("network.kind=theirs.net:Wide", r"Wide': forward gave torch.float64 for x of torch.float32: give x's"),
        ("network.kind=theirs.net:Whole", "Whole': forward gave torch.int64 for x of torch.float32: give x's dtype"),
        ("network.kind=theirs.net:InPlace", "^theirs.net:InPlace: a training step on zeros failed: RuntimeError: one "
         "of the variables needed for gradient computation has been modified by an inplace operation"),
        ("network.kind=theirs.net:Unused", "^the loss of a training step has no gradient: "),
        ("objective.weighting.kind=theirs.maths:Column", r"^weighting: kind '.*:Column' gave \[2, 2\]; \[2\] is"),
        ("objective.weighting.kind=theirs.maths:Fails",
         r"^kind 'theirs\.maths:Fails' failed: RuntimeError: shape '\[7, 7\]' is invalid .* \(theirs/maths\.py:\d+\)$"),
        ("objective.sigma_sampling.kind=theirs.maths:Negative",
         r"^sigma_sampling: kind '.*:Negative' gave \[-0\.\d+, -0\.\d+\]; noise levels above 0 are needed"),
        ("objective.kind=theirs.maths:Total", r"^objective: kind 'theirs.maths:Total' gave \[\]; \[2\] is needed"),
    ],
)  # fmt: skip
def test_what_only_a_training_step_shows_is_found_before_a_run_starts(
    config: Callable[..., Config], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_run(config(override))
    assert "\n" not in str(refused.value)


def test_a_network_that_looks_at_values_is_called_with_some(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a size it is not: a note says so, and the other parts are called with a stand-in."""
    assert check_run(config("network.kind=theirs.net:Looks")).notes == ()
    monkeypatch.setattr(dry_run, "MOST_PARAMETERS", 100)
    (note,) = check_run(config("network.kind=theirs.net:LooksWrong")).notes
    assert note.startswith("network: not run before the start, for its size (1,")
    with pytest.raises(UserError, match="Total' gave"):
        check_run(config("network.kind=theirs.net:LooksWrong", "objective.kind=theirs.maths:Total"))


def test_an_error_of_somebody_elses_code_in_a_step_names_kind_and_line_and_ends_the_run(
    config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    from scoreray.trainer.on_ray.failures import is_final

    made = prepare_run(config("network.kind=theirs.net:Late", "engine.zero_stage=0")).config
    with pytest.raises(
        UserError, match=r"^kind 'theirs\.net:Late' failed: ValueError: batch norm of 16 \(theirs/net\.py:\d+\)$"
    ) as ended:
        train(made)
    assert is_final(ended.value)
    assert "Traceback" in caplog.text
    assert "in forward" in caplog.text


def test_what_a_machine_or_another_rank_raises_within_somebody_elses_code_is_not_its_mistake(
    own_package: Callable[..., Path],
) -> None:
    own_package("theirs", call="def call(raises):\n    raises()\n")
    call = load("theirs.call:call", "kind")

    def raised(error: BaseException, module: str = "library") -> BaseException:
        scope = {"__name__": module, "error": error}
        exec("def raises():\n    raise error", scope)
        with pytest.raises(type(error)) as caught:
            call(scope["raises"])
        return caught.value

    of_device = type("OutOfMemoryError", (RuntimeError,), {})
    mistake = own_mistake(raised(KeyError("a")), {"network": {"kind": "theirs.call:call"}})
    assert str(mistake) == "kind 'theirs.call:call' failed: KeyError: 'a' (theirs/call.py:2)"
    for error in (ConnectionResetError(), MemoryError(), of_device(), StorageError("gone")):
        assert own_mistake(raised(error), {}) is None
    for module in ("torch.distributed.distributed_c10d", "deepspeed.runtime.engine", "scoreray.trainer.loop"):
        assert own_mistake(raised(RuntimeError("closed by peer"), module), {}) is None


def test_own_process_weighting_noise_levels_and_objective_compute_what_ours_do(
    config: Callable[..., Config], small_set: str
) -> None:
    """Each is written as EDM's is, so a step's losses are the same bits."""
    data = Manifest.at(small_set)
    ours = ["network.kind=mlp", "network.hidden_size=16"]
    theirs = [
        *ours, "process.kind=theirs.maths:Process", "objective.kind=theirs.maths:Objective",
        "objective.weighting.kind=theirs.maths:Weighting", "objective.sigma_sampling.kind=theirs.maths:Sampling",
    ]  # fmt: skip

    def losses(overrides: list[str]) -> torch.Tensor:
        torch.manual_seed(0)
        made = config(*overrides)
        module = build_training_module(made, run_fields(made.data, data))
        images = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
        loss, _ = module(images, torch.tensor([0, 1, 2, -1]), torch.arange(4))
        return loss.detach()

    assert torch.equal(losses(theirs), losses(ours))
    assert torch.equal(losses([*theirs, "objective.scale=2"]), 2 * losses(ours))
    found = config(*theirs)
    assert found.process.sigma_range() == pytest.approx((0.002, 80.0))
    assert found.process.time(40.001).item() == pytest.approx(0.5, abs=1e-4)  # by bisection, as it names no inverse
    with pytest.raises(UserError, match=r"process: most 1000000000000\.0 make noise levels"):
        config(*theirs, "process.most=1e12")


def test_a_process_that_lacks_the_code_says_so_where_the_part_is_used(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpickling itself does not fail: Ray would report that as a failure of its own."""
    stored = pickle.dumps(config().network)
    monkeypatch.setattr(gate, "_paths", {})
    monkeypatch.setattr(gate, "_names", {})
    for cached in (part.config_class, part._adapter):  # as in a process that has not imported it
        cached.cache_clear()
    found = pickle.loads(stored)
    with pytest.raises(UserError, match=r"^kind 'theirs\.net:Net' is code of somebody else's"):
        found.build((2,), {})
    with pytest.raises(UserError, match=r"--with theirs"):
        _ = found.is_machine


def test_an_own_text_encoder_is_built_inside_ours(config: Callable[..., Config]) -> None:
    from scoreray.trainer.diffusion.condition import Condition, ConditionSpec

    made = config("network.kind=mlp", "network.text_encoder.kind=theirs.maths:Encoder", "network.text_encoder.size=6")
    network = made.network.build((2,), {"text": ConditionSpec("text", (5,))})
    assert [one.num_embeddings for one in network.modules() if isinstance(one, torch.nn.Embedding)] == [256]
    given = Condition({"text": torch.zeros(3, 5, dtype=torch.uint8)}, {"text": torch.ones(3, 5, dtype=torch.bool)})
    assert network(torch.zeros(3, 2), torch.zeros(3), given).shape == (3, 2)
    assert yaml.safe_load(dump_config(made))["network"]["text_encoder"] == {"kind": "theirs.maths:Encoder", "size": 6}
