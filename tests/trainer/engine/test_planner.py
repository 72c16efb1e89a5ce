"""The memory that a stage takes on a rank, the time that a step is predicted to take, and the choice from both."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.doctor.examine import examine
from scoreray.cluster.doctor.machine import Machine
from scoreray.cluster.finding import Finding
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.diffusion.condition import Conditions, ConditionSpec, class_condition
from scoreray.trainer.diffusion.condition_shapes import example_condition
from scoreray.trainer.engine.communication import GpuNodes, Sharding, Work, shardings, step_time
from scoreray.trainer.engine.planner import (
    STATE_SHARE,
    WORTH,
    Advice,
    Memory,
    activation_bytes,
    advise,
    bytes_per_parameter,
    bytes_per_rank,
    choose_sharding,
    memory,
    work_of_rank,
)
from scoreray.trainer.meta import meta_module
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.flops import training_flops
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
def test_without_a_prediction_the_lowest_stage_that_fits_is_chosen_and_the_reason_given(
    num_params: int, stage: int
) -> None:
    chosen, why = choose_sharding(num_params, 16, 80 * GIB, half=True)
    assert chosen == Sharding(stage)
    assert bytes_per_rank(num_params, stage, 16, half=True) <= STATE_SHARE * 80 * GIB
    assert "fits 60% of its 80.0 GiB" in why
    assert (f"ZeRO-{stage - 1}'s" in why) == (stage > 0)


def test_what_fits_nowhere_is_sharded_most_and_said_so() -> None:
    chosen, why = choose_sharding(10**12, 8, 80 * GIB, half=True)
    assert chosen == Sharding(3)
    assert "is more than" in why


def test_no_stage_above_the_highest_of_an_objective_is_chosen() -> None:
    highest = MaximumLikelihoodObjective.max_zero_stage
    chosen, why = choose_sharding(20 * 10**9, 16, 80 * GIB, half=True, max_stage=highest)
    assert chosen == Sharding(2)
    assert "is more than" in why


def test_offload_leaves_weights_and_gradients() -> None:
    assert bytes_per_parameter(2, 4, half=True, offload=True) == 2 + 2 / 4
    assert choose_sharding(10**6, 4, GIB, half=True, offload=True)[0] == Sharding(1)  # stage 0 has nothing to offload


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
    # Norms of bf16 images on a CPU with matrix units keep 7% less: the plan is of torch's own, which all others use.
    assert 8 * every == pytest.approx(left, rel=0.05 if dtype == torch.float32 else 0.08)
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


FREE = GpuNodes(8, 1e12, 1e11, 1e10, 0.0, 0.0)
"""Nodes of 8 whose messages cost by the byte alone: 100 GB/s inside, 10 GB/s of each GPU between them."""


def auto(
    work: Work, num_gpus: int, gib: float, nodes: GpuNodes = FREE, ranks_per_node: int = 8, highest: Any = 3
) -> tuple[Sharding, str]:
    return choose_sharding(
        int(work.num_params),
        num_gpus,
        int(gib * GIB),
        half=True,
        max_stage=highest,
        ranks_per_node=ranks_per_node,
        predict=lambda one: step_time(one, num_gpus, work, nodes),
    )


# 1e9 parameters on two nodes: 4 GB of gradients take 2 x 4 / 8 / 2 / 10 s = 50 ms between nodes and 70 ms inside as a
# sum, 25 and 35 ms as a scatter, 2 GB of weights half of a scatter's. 24 bytes a parameter fit 60% of 40 GiB.
QUICK, SLOW = Work(1e9, 3e12, 1), Work(1e9, 3e9, 1)  # 3 s and 3 ms of computing

FAR = replace(FREE, between_bytes_per_s=2e9)
LAYERS, HOPS = replace(SLOW, num_layers=1000), replace(FREE, inside_latency_s=1e-4)


def test_a_step_by_hand() -> None:
    """What `QUICK` and `SLOW` take of two nodes' links, by arithmetic."""
    time = {one: step_time(one, 16, SLOW, FREE) for one in shardings(16, 8)}
    assert all(one.compute_s == pytest.approx(3e-3) for one in time.values())
    buckets = {0: math.ceil(1e9 / 31_250_000), 1: math.ceil(1e9 / 125_000_000)}
    for stage, count in buckets.items():  # all but 0.9 of the backward pass, and the last bucket
        exposed = 0.07 - 0.9 * 2e-3 + 0.07 / count + (0.0175 if stage else 0)
        assert time[Sharding(stage)].exposed_s == pytest.approx(exposed, rel=1e-4)  # type: ignore[arg-type]
    assert time[Sharding(2)] == time[Sharding(1)]
    three = 0.0175 - 0.9e-3 + (0.0175 + 0.035) - 1.8e-3 + 0.0175 / 28
    assert time[Sharding(3)].exposed_s == pytest.approx(three)
    # Inside the node a gather of the backward pass takes as long as one of both nodes: the links inside are the slower.
    assert time[Sharding(3, 8)].exposed_s == pytest.approx(three)
    assert step_time(Sharding(3), 16, SLOW, FAR).exposed_s == pytest.approx(
        0.0625 - 0.9e-3 + (0.0625 + 0.125) - 1.8e-3 + 0.0625 / 28
    )
    assert step_time(Sharding(3, 8), 16, SLOW, FAR).exposed_s == pytest.approx(
        0.0625 - 0.9e-3 + (0.0175 + 0.125) - 1.8e-3 + 0.0625 / 28
    )
    hidden = step_time(Sharding(3), 16, QUICK, FREE)
    assert hidden.exposed_s == pytest.approx(0.0175 / 28)
    assert hidden.efficiency == pytest.approx(3 / (3 + 0.0175 / 28))


def test_accumulation_multiplies_what_stages_2_and_3_send() -> None:
    four = replace(SLOW, num_micro_batches=4, flops_per_image=0)
    for stage, times in ((0, 1), (1, 1), (3, 4)):
        one = step_time(Sharding(stage), 16, replace(four, num_micro_batches=1), FREE)  # type: ignore[arg-type]
        assert step_time(Sharding(stage), 16, four, FREE).exposed_s == pytest.approx(times * one.exposed_s)  # type: ignore[arg-type]
    summed, weights = 0.07 * 9 / 8, 0.0175
    assert step_time(Sharding(2), 16, four, FREE).exposed_s == pytest.approx(4 * summed + weights, rel=1e-4)


@pytest.mark.parametrize(
    ("gib", "work", "nodes", "chosen"),
    [
        (48, QUICK, FREE, Sharding(0)),  # stage 3 hides a little more, less than what it must save
        (48, SLOW, FAR, Sharding(3, 8)),  # 208 ms against 259
        (30, QUICK, FREE, Sharding(1)),  # 0 does not fit; gathering, which nothing hides, is 1% of the step
        (30, SLOW, FREE, Sharding(3, 8)),  # 71 ms against 97 at stage 1
        (30, SLOW, FAR, Sharding(3, 8)),  # 208 ms against 253 and 345
        (30, LAYERS, HOPS, Sharding(1)),  # 0.1 s against 4: each of 1,000 layers is gathered along 16 hops
        (6, LAYERS, HOPS, Sharding(2)),  # as 1, which does not fit
        (2.5, LAYERS, HOPS, Sharding(3)),  # nothing else fits
        (30, replace(SLOW, num_micro_batches=4), FREE, Sharding(1)),  # 2 and 3 send gradients four times
    ],
)
def test_auto_is_the_quickest_prediction_of_those_that_fit(
    gib: float, work: Work, nodes: GpuNodes, chosen: Sharding
) -> None:
    """Whatever is chosen fits, no other that fits is quicker by more than `WORTH`, and no lower one is within it."""
    found, why = auto(work, 16, gib, nodes)
    fits = {
        one: step_time(one, 16, work, nodes).total_s
        for one in shardings(16, 8)
        if bytes_per_rank(10**9, one.stage, 16, half=True, partition_group=one.partition_group)
        <= STATE_SHARE * gib * GIB
    }
    assert found in fits
    least = (1 + WORTH) * min(fits.values())
    assert fits[found] <= least
    before = itertools.takewhile(lambda one: one != found, fits)
    assert all(fits[one] > least for one in before)
    assert found == chosen
    assert (" a step" in why) == (len(fits) > 1)


@pytest.mark.parametrize("link", ["inside_bytes_per_s", "between_bytes_per_s", "flops_per_s"])
@pytest.mark.parametrize("work", [QUICK, SLOW, LAYERS, replace(SLOW, num_micro_batches=4)])
def test_no_step_is_longer_where_a_rate_is_higher(link: str, work: Work) -> None:
    rates = [10.0**exponent for exponent in range(8, 14)]
    for one in shardings(32, 8):
        times = [step_time(one, 32, work, replace(FREE, **{link: rate})).total_s for rate in rates]
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1]


def test_no_group_where_nodes_are_uneven_or_one_and_no_stage_above_the_highest() -> None:
    assert auto(SLOW, 16, 48, FAR, ranks_per_node=16)[0].partition_group == 1
    assert auto(SLOW, 18, 48, FAR, ranks_per_node=8)[0].partition_group == 1
    assert auto(SLOW, 16, 48, FAR, highest=2)[0] == Sharding(0)
    assert auto(SLOW, 16, 2.6, FAR)[0] == Sharding(3)  # the second copy of the weights would not fit


def test_gpus_are_known_by_name() -> None:
    a100, other = GpuNodes.of("NVIDIA A100-SXM4-80GB", 4, 100), GpuNodes.of("", 8)
    assert (a100.gpus_per_node, a100.flops_per_s) == (4, 156e12)
    assert a100.between_bytes_per_s == pytest.approx(0.84 * 12.5e9)
    assert other.flops_per_s == GpuNodes().flops_per_s
    assert other.inside_bytes_per_s == pytest.approx(GpuNodes().inside_bytes_per_s, rel=0.01)
    assert other.between_bytes_per_s == pytest.approx(GpuNodes().between_bytes_per_s)


def test_what_a_rank_computes_is_counted() -> None:
    network = DiTConfig(hidden_size=64, depth=3, num_heads=2).build((3, 16, 16), {})
    next(iter(network.parameters())).requires_grad_(False)
    work = work_of_rank(network, (3, 16, 16), 8, 2, half=True)
    assert work.flops_per_image == training_flops(network, (3, 16, 16)) > 0
    assert work.num_params + work.num_frozen == sum(one.numel() for one in network.parameters())
    assert work.num_frozen == next(iter(network.parameters())).numel()
    assert (work.images_per_gpu, work.num_layers, work.num_micro_batches, work.weight_bytes) == (8, 3, 2, 2)
    assert work_of_rank(network, None, 8, 2, half=False).flops_per_image == 0


def plans(activations: float, world_size: int = 16, num_params: int = 10**9) -> dict[tuple[Sharding, bool], Memory]:
    return {
        (one, offload): memory(
            num_params,
            one.stage,
            world_size,
            half=True,
            num_averages=2,
            offload=offload,
            partition_group=one.partition_group,
            activations=activations,
        )
        for one in shardings(world_size, 8)
        for offload in ((True, False) if one.stage else (False,))
    }


def test_advice_is_the_quickest_that_fits_at_its_peak() -> None:
    def advice(gib: float, activations: float = GIB, nodes: GpuNodes | None = FAR) -> Advice:
        predict = (lambda one: step_time(one, 16, SLOW, nodes)) if nodes else None
        return advise(plans(activations), gib * GIB, predict)

    assert [advice(gib, nodes=None).stage for gib in (80, 8, 5, 3.1)] == [0, 1, 2, 3]
    assert (advice(80, nodes=FREE).stage, advice(80, nodes=FREE).offload) == (0, False)
    assert (advice(80).stage, advice(80).partition_group) == (3, 8)
    assert (advice(8, nodes=HOPS).stage, advice(8, nodes=FREE).stage) == (1, 3)
    assert "the stages before it that do not fit take" in advice(8).why
    assert "a second copy of the weights in a node" in advice(3.3).why
    assert (advice(3.3).stage, advice(3.3).partition_group) == (3, 8)
    assert (advice(3.1).stage, advice(3.1).partition_group) == (3, 1)  # the second copy would not fit
    assert (advice(1.65).offload, advice(1.65).partition_group) == (True, 8)
    assert (advice(1.5).offload, advice(1.5).partition_group) == (True, 1)
    assert advice(0.5).stage is None
    assert "the least is" in advice(0.5).why
    assert advice(80, activations=100 * GIB).stage is None
