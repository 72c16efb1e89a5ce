"""The memory that a stage takes on a rank, and the choice that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.doctor.examine import Machine, examine
from scoreray.cluster.finding import Finding
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.diffusion.condition import Conditions, ConditionSpec, class_condition
from scoreray.trainer.diffusion.condition_shapes import example_condition
from scoreray.trainer.engine.planner import (
    STATE_SHARE,
    Advice,
    Memory,
    activation_bytes,
    advise,
    bytes_per_parameter,
    bytes_per_rank,
    choose_stage,
    memory,
)
from scoreray.trainer.meta import meta_module
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.network import num_parameters
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.objectives.maximum_likelihood import MaximumLikelihoodObjective
from scoreray.trainer.run_data import open_run_data

GIB = 1 << 30


def test_bytes_per_parameter_are_zeros_formulas() -> None:
    """2 + 2 + K sharded as Rajbhandari 2020 has it; K is 20 here: fp32 gradient, master, moments and one average."""
    assert bytes_per_parameter(0, 4, half=True) == 2 + 2 + 20
    assert bytes_per_parameter(1, 4, half=True) == 2 + 2 + 20 / 4
    assert bytes_per_parameter(2, 4, half=True) == 2 + (2 + 20) / 4
    assert bytes_per_parameter(3, 4, half=True) == (2 + 2 + 20) / 4
    assert bytes_per_parameter(0, 1, half=False, num_averages=0) == 16  # fp32: master, gradient, two moments


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_a_higher_stage_never_takes_more(half: bool, world_size: int) -> None:
    needs = [bytes_per_rank(10**9, stage, world_size, half=half) for stage in (1, 2, 3)]
    assert needs == sorted(needs, reverse=True)


@pytest.mark.parametrize(("num_params", "stage"), [(10**6, 0), (3 * 10**9, 1), (15 * 10**9, 2), (20 * 10**9, 3)])
def test_the_cheapest_stage_that_fits_is_chosen_and_the_reason_given(num_params: int, stage: int) -> None:
    chosen, why = choose_stage(num_params, 16, 80 * GIB, half=True)
    assert chosen == stage
    assert bytes_per_rank(num_params, chosen, 16, half=True) <= STATE_SHARE * 80 * GIB
    assert "fits 60% of its 80.0 GiB" in why
    assert (f"ZeRO-{stage - 1}'s" in why) == (stage > 0)


def test_what_fits_nowhere_is_sharded_most_and_said_so() -> None:
    chosen, why = choose_stage(10**12, 8, 80 * GIB, half=True)
    assert chosen == 3
    assert "is more than" in why


def test_no_stage_above_the_highest_of_an_objective_is_chosen() -> None:
    chosen, why = choose_stage(20 * 10**9, 16, 80 * GIB, half=True, max_stage=MaximumLikelihoodObjective.max_zero_stage)
    assert chosen == 2
    assert "is more than" in why


def test_offload_leaves_weights_and_gradients() -> None:
    assert bytes_per_parameter(2, 4, half=True, offload=True) == 2 + 2 / 4
    assert choose_stage(10**6, 4, GIB, half=True, offload=True)[0] == 1  # stage 0 has nothing to offload


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_the_parts_sum_to_the_formula(stage: int, half: bool, offload: bool) -> None:
    parts = memory(1000, stage, 4, half=half, num_averages=2, offload=offload and stage > 0)
    assert parts.state == pytest.approx(
        bytes_per_rank(1000, stage, 4, half=half, num_averages=2, offload=offload and stage > 0)
    )
    assert (parts.host > 0) == (offload and stage > 0)


CONDITIONS = {
    "label": ConditionSpec("class", classes=tuple("abcd")),
    "place": ConditionSpec("vector", (3,)),
    "coarse": ConditionSpec("concat", (2, 4, 4)),
    "t5": ConditionSpec("sequence", (20, 16)),
    "caption": ConditionSpec("text", (24,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conditions", [class_condition("abcd"), CONDITIONS], ids=["classes", "every kind"])
@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,)),
        DiTConfig(hidden_size=64, depth=3, num_heads=2),
    ],
    ids=["unet", "dit"],
)
def test_activations_are_what_autograd_saves(
    config: UNetConfig | DiTConfig, conditions: Conditions, dtype: torch.dtype
) -> None:
    """Against the bytes that a real forward pass leaves allocated, by torch's profiler."""
    network = config.build((3, 16, 16), conditions)
    every, recomputed = activation_bytes(network, (3, 16, 16), dtype)
    network = network.to(dtype)
    x, c_noise, given = torch.randn(8, 3, 16, 16), torch.zeros(8), example_condition(conditions, 8)
    network(x, c_noise, given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = network(x, c_noise, given)
    events = profile.profiler.kineto_results.events()
    left = sum(event.nbytes() for event in events if event.name() == "[memory]") - output.nbytes
    assert 8 * every == pytest.approx(left, rel=0.05)
    assert recomputed < 0.7 * every


def test_the_doctor_counts_what_conditions_add(
    conditioned_set: str, conditions: dict[str, Any], small_run: Any, tmp_path: Path
) -> None:
    def memory_of(url: str, conditions: dict[str, Any], machine: Machine | None = None) -> Finding:
        settings = small_run("run", tmp_path, 32, data={"url": url, "global_batch_size": 16, "conditions": conditions})
        return next(one for one in examine(load_config(settings), machine) if one.topic == "memory")

    config = load_config(small_run("run", tmp_path, 32, data={"url": conditioned_set, "conditions": conditions}))
    network = meta_module(config, run_fields(config.data, open_run_data(config))).denoiser.network
    found, plain = memory_of(conditioned_set, conditions), memory_of(conditioned_set, {})
    assert found.state == plain.state == "good"
    assert found.facts["num_params"] == num_parameters(network) > plain.facts["num_params"]
    activations, without = (one.facts["stages"][0]["activations"] for one in (found, plain))
    assert activations == 16 * activation_bytes(network, (2, 8, 8), torch.float32)[0] > without
    unknown = memory_of(str(tmp_path / "absent"), conditions, Machine(image_shape=(2, 8, 8)))
    assert unknown.state == "note"
    assert unknown.text.startswith("without what data.conditions add")
    assert unknown.facts["num_params"] == plain.facts["num_params"]
    larger = memory_of(conditioned_set, conditions, Machine(image_shape=(2, 16, 16)))
    assert larger.facts["stages"][0]["activations"] > activations


def plans(activations: float, world_size: int = 16, num_params: int = 10**9) -> dict[tuple[int, bool], Memory]:
    return {
        (stage, offload): memory(
            num_params, stage, world_size, half=True, num_averages=2, offload=offload, activations=activations
        )
        for stage in (0, 1, 2, 3)
        for offload in ((True, False) if stage else (False,))
    }


def test_advice_goes_from_the_quickest_to_the_smallest() -> None:
    def advice(gib: float, activations: float = GIB) -> Advice:
        return advise(plans(activations), gib * GIB, world_size=16, num_nodes=2)

    assert advice(80) == advise(plans(GIB), 80 * GIB, world_size=16, num_nodes=1)
    assert (advice(80).stage, advice(80).offload) == (0, False)
    assert advice(8).stage == 1
    assert (advice(3.3).stage, advice(3.3).partition_group) == (3, 8)
    assert (advice(3.1).stage, advice(3.1).partition_group) == (3, 1)  # the second copy would not fit
    assert advice(1.6).offload
    assert advice(0.5).stage is None
    assert "the least is" in advice(0.5).why
    assert advice(80, activations=100 * GIB).stage is None
