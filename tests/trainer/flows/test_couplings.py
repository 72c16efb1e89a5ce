"""Couplings: optimal pairs, the same at every world size, and what they do to a flow's paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scoreray.data.reading.batches import RankLanes
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import FlowMatching
from scoreray.trainer.diffusion.targets import Mixture
from scoreray.trainer.flows.couplings import OptimalTransportCoupling, groups_of, paired
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.objectives.denoising import FlowMatchingObjective
from scoreray.trainer.step import TrainingModule

OT = OptimalTransportCoupling(8)


def cost(x0: Tensor, x1: Tensor) -> float:
    return float((x0 - x1).square().sum())


def test_the_pairs_are_the_cheapest_of_all_permutations_and_of_pot():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(6, 3, generator=g, dtype=torch.float64), torch.randn(6, 3, generator=g, dtype=torch.float64)
    found = OptimalTransportCoupling(6).partners(x0, x1)
    best = min(itertools.permutations(range(6)), key=lambda order: cost(x0, x1[list(order)]))
    assert found.tolist() == list(best)
    import ot  # here: a second for every process that collects the tests

    x0, x1 = torch.randn(64, 5, generator=g), torch.randn(64, 5, generator=g)
    uniform = torch.full((64,), 1 / 64, dtype=torch.float64).numpy()
    plan = ot.emd(uniform, uniform, ot.dist(x0.double().numpy(), x1.double().numpy()))
    partners = OptimalTransportCoupling(64).partners(x0, x1)
    assert partners.tolist() == plan.argmax(1).tolist()


@pytest.mark.parametrize("num_lanes", [4, 8, 32])
def test_a_group_is_one_rank_s_at_every_world_size_and_all_pairs_are_the_same(num_lanes):
    batch, size = 32, 8
    x0, x1 = (noise.normal(0, torch.arange(64, 96), (2,), stream=stream) for stream in (1, 2))
    whole = paired(OT, x0, x1, groups_of(torch.arange(64, 96), batch, num_lanes, size))
    assert sorted(whole.tolist()) == sorted(x1.tolist())  # both marginals are what they were
    assert cost(x0, whole) < 0.8 * cost(x0, x1)
    for world_size in (1, 2, 4):
        seen = []
        for rank in range(world_size):
            positions = torch.from_numpy(RankLanes(batch, rank, world_size, num_lanes).positions(64, 1))
            groups = groups_of(positions, batch, num_lanes, size)
            assert set(groups.bincount().tolist()) <= {0, size}
            rows = positions - 64
            assert torch.equal(paired(OT, x0[rows], x1[rows], groups), whole[rows])
            seen += groups.unique().tolist()
        assert sorted(seen) == [8, 9, 10, 11]


def module(objective: FlowMatchingObjective, conditions: dict[str, ConditionSpec] | None = None) -> TrainingModule:
    torch.manual_seed(0)
    network = MLPConfig(hidden_size=8, num_layers=1).build((2,), conditions or {})
    return TrainingModule(
        Denoiser(network), objective, FlowMatching(), seed=3, global_batch_size=32, num_lanes=8
    )  # fmt: skip


def test_classes_change_no_partners_and_other_conditions_are_refused():
    spec = ConditionSpec("class", classes=("a", "b"))
    step = module(FlowMatchingObjective(coupling=OT), {"label": spec})
    positions = torch.arange(32)
    x0, labels = torch.randn(32, 2) + torch.arange(32)[:, None] % 2 * 20, torch.arange(32) % 2
    source = step.paired_source(x0, Condition({"label": labels}), positions, None)
    z = noise.normal(3, positions, (2,), stream=noise.STREAM_NOISE)
    for label in (0, 1):  # the noise of a class is what it was: the other's would be at its far side
        mine = labels == label
        assert sorted(source[mine].tolist()) == sorted(z[mine].tolist())
    with pytest.raises(Exception, match="would pair noise with values of condition 'place'"):
        module(FlowMatchingObjective(coupling=OT), {"place": ConditionSpec("vector", (2,))})


def test_an_independent_coupling_changes_nothing_and_pairs_are_independent_of_micro_batches():
    plain, coupled = module(FlowMatchingObjective()), module(FlowMatchingObjective(coupling=OT))
    positions, x0 = torch.arange(32), torch.randn(32, 2)
    assert plain.paired_source(x0, None, positions, None) is None
    source = coupled.paired_source(x0, None, positions, None)
    whole, _ = coupled(x0, None, positions, source=source)
    parts = [coupled(x0[i : i + 4], None, positions[i : i + 4], source=source[i : i + 4])[0] for i in range(0, 32, 4)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-5)
    assert not torch.allclose(plain(x0, None, positions)[0], whole)


def test_a_group_that_is_no_rank_s_is_refused_before_the_run():
    words = ["objective={kind: flow_matching, coupling: {kind: optimal_transport, group_size: 16}}"]
    config = load_config("configs/demo.yaml", [*words, "data.global_batch_size=64", "scaling.workers=[1, 4]"])
    assert config.world_sizes == (1, 2, 4)
    with pytest.raises(Exception, match=r"group_size: 16 does not divide the 8 rows .* such as 8"):
        load_config("configs/demo.yaml", [*words, "data.global_batch_size=64", "scaling.workers=[1, 8]"])


def transported(source: Tensor, x0: Tensor, steps: int) -> Tensor:
    """`source` along Euler's steps on the exact velocity of the flow whose pairs are (x0, source) rows, a Parzen window
    of pairs: E[x1 - x0 | x_t] over the finite set."""
    x = source.clone()
    for k in range(steps, 0, -1):
        t, step = k / steps, 1 / steps
        centers, width = (1 - t) * x0 + t * source, 0.05
        weights = (-torch.cdist(x, centers).square() / (2 * width**2)).softmax(1)
        x = x - step * weights @ (source - x0)
    return x


def test_few_steps_of_euler_err_less_along_optimal_pairs_than_along_independent_ones():
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    ring = Mixture(torch.stack([angle.cos(), angle.sin()], 1) * 2, 0.1)
    x0, z = ring.sample(512, g), torch.randn(512, 2, generator=g, dtype=torch.float64)
    pairs = {"independent": z, "optimal": z[OptimalTransportCoupling(512).partners(x0, z)]}
    errors = {name: off_modes(transported(source, x0, 2), ring) for name, source in pairs.items()}
    assert errors["optimal"] < 0.5 * errors["independent"], errors


def off_modes(x: Tensor, ring: Mixture) -> float:
    """The mean distance to the nearest mode."""
    return float(torch.cdist(x, ring.means).min(1).values.mean())
