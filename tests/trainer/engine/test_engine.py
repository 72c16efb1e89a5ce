"""Every ZeRO stage trains what one process trains, and any checkpoint continues under any stage and world size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scoreray.data.packing.pack import pack
from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.checkpoint import latest

pytestmark = pytest.mark.timeout(1800)  # on a machine that is busy with other tests, processes take minutes to start
RANKS = Path(__file__).with_name("engine_ranks.py")
KEYS = ("master", "exp_avg", "exp_avg_sq", "ema_0.050", "ema_0.100", "ema_half-life")


@pytest.fixture(scope="module")
def trained(
    run_ranks: Callable[..., str], free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of checkpoints by world sizes 1 and 2."""
    folder = tmp_path_factory.mktemp("engine")
    for classes in (3, 4):
        images = np.random.default_rng(0).integers(0, 256, (32, 4, 4), dtype=np.uint8)
        np.savez(folder / "p.npz", images=images, labels=np.arange(32) % classes)
        pack(str(folder / "p.npz"), str(folder / f"{classes}-classes"))
    run_ranks(RANKS, str(folder), str(free_port()), worlds=(1, 2), imports=("peft",))
    return folder


def facts(folder: Path, world: int) -> dict:
    return json.loads((folder / f"facts-{world}.json").read_text())


def state(folder: Path, name: str, key: str) -> dict[str, torch.Tensor]:
    checkpoint = latest(open_store(folder / name))
    assert checkpoint is not None
    return checkpoint.full_state(key)


@pytest.mark.parametrize("name", ["flat", "flat-micro", "zero1", "zero2", "zero2-micro", "zero3", "zero2-offload"])
@pytest.mark.parametrize("key", KEYS)
def test_sharded_state_is_that_of_one_process(trained: Path, name: str, key: str) -> None:
    """Masters, moments and every average, on two ranks, to the rounding of the gradient's reduction."""
    reference = state(trained, "flat-1", key)
    sharded = state(trained, f"{name}-2", key)
    assert sharded.keys() == reference.keys()
    for parameter, values in reference.items():
        torch.testing.assert_close(sharded[parameter], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgld0", "sgld1", "sgld2", "sgld3"])
def test_langevin_dynamics_on_weights_draws_the_same_noise_under_every_stage(trained: Path, name: str) -> None:
    """Its noise is some 0.014 a step: a weight that had another rank's number would be that far off."""
    for key in ("master", "exp_avg_sq", "ema_0.050"):
        reference, sharded = state(trained, "sgld0-1", key), state(trained, f"{name}-2", key)
        assert sharded.keys() == reference.keys()
        for parameter, values in reference.items():
            torch.testing.assert_close(sharded[parameter], values, rtol=1e-4, atol=1e-5)


OTHERS = ("flat-micro", "zero2-micro", "zero3", "zero3-bf16")
STEPS = {
    "conditions": ("flat", "zero1", "zero2-offload", *OTHERS),
    **dict.fromkeys(("flow map", "student", "autoencoder"), OTHERS),
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, names in STEPS.items() for name in names])
def test_steps_of_other_modules_are_those_of_one_process(trained: Path, name: str, what: str) -> None:
    """Of a U-Net, of a flow map and a guided teacher's student that are DiTs, with conditions of every kind, and of an
    autoencoder; under each stage, in micro-batches, offloaded, with activations recomputed; in bf16 to its rounding."""
    norms, one = facts(trained, 2)[f"{name}, {what}"], facts(trained, 1)[f"flat, {what}"]
    assert norms == pytest.approx(one, rel=0.1 if "bf16" in name else 1e-3)
    assert min(one) > 0


@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-bf16", "zero3-bf16"])
def test_bf16_weights_train_fp32_masters(trained: Path, name: str) -> None:
    reference, masters = state(trained, "flat-1", "master"), state(trained, f"{name}-2", "master")
    for parameter, values in reference.items():
        assert masters[parameter].dtype == torch.float32
        difference = (masters[parameter] - values).abs()
        assert difference.max() <= 0.08  # 4 steps of Adam at rate 0.01, at worst in opposite directions
        assert difference.mean() < 0.002
    assert any((values.bfloat16().float() != values).any() for values in masters.values())


@pytest.mark.parametrize(
    "name",
    ["flat", "zero1", "zero2", "zero3", "zero2-offload", "flat-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"],
)
def test_a_non_finite_gradient_stops_before_the_step(trained: Path, name: str) -> None:
    """One NaN on one rank: every rank refuses, and masters, moments and averages are bitwise what they were."""
    assert facts(trained, 2)[name]["refused"]
    for key in KEYS:
        before, after = state(trained, f"{name}-2", key), state(trained, f"{name}-2-after-refusal", key)
        assert all(torch.equal(before[parameter], after[parameter]) for parameter in before)


@pytest.mark.parametrize("name", ["flat", "flat-micro", "zero1", "zero2", "zero2-micro", "zero3", "zero2-offload"])
def test_a_refused_step_leaves_nothing_for_the_next(trained: Path, name: str) -> None:
    """The step after it has the gradient that it has where nothing was refused: none of the NaNs stayed in a buffer."""
    two = facts(trained, 2)
    assert two[name]["next norm"] == pytest.approx(two["flat-1-in-flat"]["norms"][0], rel=1e-4)


@pytest.mark.parametrize("source", ["flat-1", "zero3-2"])
@pytest.mark.parametrize("name", ["flat", "zero1", "zero2", "zero3"])
def test_resharding_is_bitwise(trained: Path, source: str, name: str) -> None:
    for key in KEYS:
        before, after = state(trained, source, key), state(trained, f"{source}-in-{name}", key)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[parameter], after[parameter]) for parameter in before)


def test_the_step_after_resharding_is_the_same_step(trained: Path) -> None:
    two = facts(trained, 2)
    norms = [two[f"{source}-in-{name}"]["norms"][0] for source in ("flat-1", "zero3-2") for name in ("flat", "zero3")]
    assert max(norms) - min(norms) < 1e-5 * norms[0]
    assert two["flat"]["norms"] == pytest.approx(facts(trained, 1)["flat"]["norms"], rel=1e-5)


@pytest.mark.parametrize("name", ["flat", "zero1", "zero2", "zero3", "zero3-bf16"])
def test_a_run_begins_from_another_and_leaves_frozen_parts_under_every_stage(trained: Path, name: str) -> None:
    """What is frozen has the other model's bits, also in bf16; the rest is trained as on one process."""
    lines = {key: state(trained, f"begun-{name}-2", key) for key in ("master", "ema_0.050")}
    base = state(trained, "base", "ema_0.050")
    for key, values in lines.items():
        alone = state(trained, "begun-flat-1", key)
        for parameter, value in values.items():
            if parameter.startswith(("denoiser.network.first", "denoiser.network.layers")) and "modul" not in parameter:
                assert torch.equal(value, base[parameter])
            else:
                atol = 3e-3 if "bf16" in name else 1e-5  # two steps of Adam at rate 1e-3, at worst in other directions
                torch.testing.assert_close(value, alone[parameter], rtol=1e-4, atol=atol)
    classes = "denoiser.network.embedding.classes.weight"
    assert (lines["master"][classes][4] - base[classes][0]).abs().max() < 3e-3  # began as the null class
    assert not torch.equal(lines["master"][classes], torch.cat([base[classes], base[classes][:1]]))


@pytest.mark.parametrize("name", ["flat", "zero1", "zero2", "zero3", "zero3-bf16"])
def test_a_lora_is_trained_and_resumed_under_every_stage(trained: Path, name: str) -> None:
    """Adapters and their averages are those of one process; nothing else is stored."""
    for key in ("master", "exp_avg", "ema_0.050"):
        values, alone = state(trained, f"lora-{name}-2", key), state(trained, "lora-flat-1", key)
        assert values.keys() == alone.keys()
        assert all(".lora_" in parameter and value.any() for parameter, value in values.items())
        for parameter, value in values.items():
            atol = 3e-3 if "bf16" in name else 1e-5
            torch.testing.assert_close(value, alone[parameter], rtol=1e-4, atol=atol)


def test_a_deepspeed_that_arranges_its_weights_otherwise_is_refused_in_a_line(trained: Path) -> None:
    """What checkpoints take for a rank's share of the weights is compared with the weights themselves."""
    for stage, line in zip((3, 2, 1), facts(trained, 2)["refusals"], strict=True):
        assert line.startswith(f"engine.zero_stage: {stage}: DeepSpeed ")
        assert line.endswith("take zero_stage 0, or another deepspeed")
