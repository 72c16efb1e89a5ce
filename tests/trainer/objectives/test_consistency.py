"""Consistency and progressive distillation against data whose probability-flow ODE is solved by a formula.

Of N(m, s^2) its paths are x_rho = m + (x - m) sqrt((s^2 + rho^2) / (s^2 + sigma^2)), so the consistency function is
m + (x - m) s / sqrt(s^2 + sigma^2).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.sampling.samplers import sample
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.noise import normal
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.diffusion.sigma_sampling import LogUniform
from scoreray.trainer.diffusion.targets import Mixture
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.objectives.base import FewStepObjective, NoisedBatch
from scoreray.trainer.objectives.consistency import ConsistencyObjective, ode_step
from scoreray.trainer.objectives.progressive import ProgressiveObjective, interior_levels
from scoreray.trainer.objectives.teacher import Teacher
from scoreray.trainer.step import TrainingModule

F64 = torch.float64
M, S = 0.3, 0.5


class Linear:
    """In the place of a denoiser: m + gain a(sigma) (x - m), of N(m, s^2) its posterior mean or its consistency
    function."""

    def __init__(self, power: float, gain: float = 1.0) -> None:
        self.power, self.gain = power, torch.tensor(gain, dtype=F64, requires_grad=True)

    def denoise(self, x: Tensor, sigma: Tensor, condition: object = None) -> Tensor:
        return M + self.gain * (S**2 / (S**2 + sigma.reshape(-1, 1) ** 2)) ** self.power * (x - M)


POSTERIOR_MEAN, MAP = 1.0, 0.5  # of `power`


def expected(objective: FewStepObjective, student: Any, teacher: Any, sigma: float, position: int) -> Tensor:
    """The mean error at one noise level: exact, by Gauss and Hermite's quadrature, where the error is a polynomial."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    data, z = (torch.from_numpy(grid).reshape(-1, 1) for grid in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights)).flatten() / (2 * math.pi)
    x0, level = M + S * data, torch.full((36,), sigma, dtype=F64)
    positions = torch.full((36,), position)
    batch = NoisedBatch(x0, x0 + sigma * z, level, positions=positions, process=EDM(), teacher=teacher)
    return (weight * objective.error(student, batch)).sum()


def shrinking(num_stages: int = 40, **settings: Any) -> ConsistencyObjective:
    return ConsistencyObjective(stage_images=1000, num_stages=num_stages, metric="squared", **settings)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
@pytest.mark.parametrize("teacher", [None, Linear(POSTERIOR_MEAN)], ids=["data", "teacher"])
def test_the_gradient_of_consistency_vanishes_with_the_gap_at_the_exact_map_alone(sigma, teacher):
    def gradient(power: float, stage: int) -> float:
        student = Linear(power)
        expected(shrinking(), student, teacher, sigma, 1000 * stage).backward()
        return abs(student.gain.grad.item())

    coarse, fine = gradient(MAP, 8), gradient(MAP, 10)
    if teacher is None:
        assert fine == pytest.approx(coarse / 4, rel=0.1)  # as the gap, whose Euler step is the sample's own noise
    else:
        assert fine < coarse / 12  # as its square: Heun's error
    for wrong in (POSTERIOR_MEAN, 0.8 * MAP):
        assert gradient(wrong, 10) > 100 * fine


@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_a_distilled_exact_map_has_no_loss(sigma):
    found = expected(shrinking(), Linear(MAP), Linear(POSTERIOR_MEAN), sigma, 12_000)
    assert found < 1e-12 * expected(shrinking(), Linear(POSTERIOR_MEAN), Linear(POSTERIOR_MEAN), sigma, 12_000)


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_a_teachers_step_has_the_local_error_of_its_solver(solver, order):
    x, sigma = torch.tensor([[2.0], [-1.0]], dtype=F64), torch.tensor([1.5, 0.4], dtype=F64)

    def error(share: float) -> Tensor:
        rho = sigma * (1 - share)
        exact = M + (x - M) * ((S**2 + rho**2) / (S**2 + sigma**2)).sqrt()[:, None]
        return (ode_step(Linear(POSTERIOR_MEAN).denoise, x, sigma, rho, solver) - exact).abs().detach()

    for found in (error(0.02) / error(0.01)).log2().flatten().tolist():
        assert found == pytest.approx(order, abs=0.1)
    ends = ode_step(Linear(POSTERIOR_MEAN).denoise, x, sigma, torch.zeros(2, dtype=F64), solver)
    torch.testing.assert_close(ends, Linear(POSTERIOR_MEAN).denoise(x, sigma))  # both go straight to D where rho is 0


def test_the_gap_is_a_function_of_the_place_in_the_run_and_ends_at_the_clean_sample_for_small_noise():
    objective = ConsistencyObjective(stage_images=1000, num_stages=4)
    sigma = torch.tensor([1e-3, 1.0, 80.0], dtype=F64)
    gaps = [1 - objective.lower_level(sigma, torch.full((3,), p)) / sigma for p in (0, 999, 1000, 3999, 10**9)]
    assert torch.equal(gaps[0], gaps[1])
    torch.testing.assert_close(gaps[0], torch.tensor([1, 1, 0.5], dtype=F64))  # rho is 0 where 1 + k sigmoid is over 2
    torch.testing.assert_close(gaps[2][1:], torch.tensor([(1 + 8 / (1 + math.e)) / 4, 0.25], dtype=F64))
    torch.testing.assert_close(gaps[3][2], torch.tensor(1 / 16, dtype=F64))
    assert torch.equal(gaps[3], gaps[4])


def test_both_sides_of_consistency_drop_the_same_units_and_draw_once_from_the_generator():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.masks = nn.Parameter(torch.ones(())), []

        def forward(self, x: Tensor, c_noise: Tensor, condition: object = None) -> Tensor:
            self.masks.append(torch.nn.functional.dropout(torch.ones_like(x)))
            return self.scale * x * self.masks[-1]

    network = Dropping()
    step = TrainingModule(Denoiser(network), ConsistencyObjective(), EDM(), seed=0, global_batch_size=4)
    torch.manual_seed(3)
    step(torch.randn(4, 8), None, torch.arange(4))
    after = torch.rand(1)
    assert len(network.masks) == 2
    assert torch.equal(*network.masks)
    torch.manual_seed(3)
    torch.randn(4, 8)
    torch.nn.functional.dropout(torch.ones(4, 8))
    assert torch.equal(after, torch.rand(1))


def trained(objective: FewStepObjective, data: Mixture, teacher: Any, images: int) -> Denoiser:
    """A perceptron trained for so many images of 256 a step."""
    torch.manual_seed(0)
    module = TrainingModule(
        Denoiser(MLPConfig(hidden_size=64, num_layers=2).build([1])), objective, EDM(), seed=0, global_batch_size=256
    )
    module.teacher = teacher
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, images // 256)
    for start in range(0, images, 256):
        positions = torch.arange(start, start + 256)
        x0 = data.sample(256, torch.Generator().manual_seed(start)).float()
        loss, _ = module(x0, None, positions)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return module.denoiser.eval()


def error_of_the_map(denoiser: Denoiser, data: Mixture) -> float:
    """Of one call at sigma 80 against a fine Heun walk, as a share of the data's own standard deviation."""
    x = 80 * normal(7, torch.arange(512), (1,), dtype=F64)
    exact = sample(data, x, interior_levels(128, 0.002, 80.0), sampler="heun")
    with torch.no_grad():
        found = denoiser(x.float(), 80.0)
    return float((found - exact).square().mean().sqrt() / exact.std())


class _Exact:
    """A mixture as a teacher."""

    def __init__(self, data: Mixture) -> None:
        self.data = data

    def denoise(self, x: Tensor, sigma: Tensor, condition: object = None) -> Tensor:
        return self.data(x, sigma)


def test_a_network_learns_the_map_of_a_gaussian():
    data = Mixture(torch.tensor([[M]]), S)
    objective = ConsistencyObjective(stage_images=256 * 25, num_stages=6)
    begun, done = (error_of_the_map(trained(objective, data, _Exact(data), 256 * steps), data) for steps in (1, 200))
    assert begun > 0.9  # the mean alone, which is what the posterior mean gives at sigma 80
    assert done < 0.45


@pytest.mark.slow
@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "data"])
def test_a_network_learns_the_map_of_a_mixture(taught):
    """A map that had learnt the posterior mean at sigma 80, the middle between the modes, would be 1 off, and one whose
    gap stays the first stage's is 0.53 off. The modes overlap: the jump between narrow ones is too steep for a small
    network (of std 0.1 it is 0.17 off after 1,500 steps)."""
    data = Mixture(torch.tensor([[-0.5], [0.5]]), 0.2)
    levels = LogUniform(0.02, 80, stratified=True)  # of the default's, 1% are above 40
    objective = ConsistencyObjective(sigma_sampling=levels, stage_images=256 * 100, num_stages=6)
    student = trained(objective, data, _Exact(data) if taught else None, 256 * 600)
    assert error_of_the_map(student, data) < (0.2 if taught else 0.3)  # 0.12, 0.18


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_progressive_student_that_is_right_makes_two_of_its_teachers_steps_in_one(steps):
    levels, teacher = interior_levels(2 * steps, *EDM().sampling_range()), Linear(POSTERIOR_MEAN)

    class Right:
        """(x'' - kept x) / (1 - kept), where one step of the student's leaves the share `kept` of x."""

        def denoise(self, x: Tensor, sigma: Tensor, condition: object = None) -> Tensor:
            at = (levels - sigma[0]).abs().argmin()
            first, middle, last = levels[at : at + 3]
            half = middle / first * x + (1 - middle / first) * teacher.denoise(x, first)
            ends = last / middle * half + (1 - last / middle) * teacher.denoise(half, middle)
            return (ends - last / first * x) / (1 - last / first)

    objective, student = ProgressiveObjective(steps=steps), Right()
    for sigma in levels[:-1:2].tolist():
        assert expected(objective, student, teacher, sigma, 0) < 1e-24
        assert expected(objective, teacher, teacher, sigma, 0) > 1e-9  # twice its steps are not the teacher's one
    x = 80 * normal(1, torch.arange(4), (1,), dtype=F64)
    grid = interior_levels(steps, *EDM().sampling_range())
    with torch.no_grad():
        one = sample(lambda x, sigma, *_: student.denoise(x, sigma), x, grid, sampler="euler")
        two = sample(lambda x, sigma, *_: teacher.denoise(x, sigma), x, levels, sampler="euler")
    torch.testing.assert_close(one, two)


def test_every_level_of_a_progressive_students_grid_is_drawn_and_no_other_and_is_its_teachers():
    levels = interior_levels(6, 0.002, 80.0)
    assert levels[0] == 80
    assert levels[-1] == 0
    assert torch.equal(interior_levels(12, 0.002, 80.0)[::2], levels)
    module = TrainingModule(
        Denoiser(MLPConfig(hidden_size=4).build([1])),
        ProgressiveObjective(steps=6),
        EDM(),
        seed=0,
        global_batch_size=64,
    )
    module.teacher = Teacher(Denoiser(MLPConfig(hidden_size=4).build([1])))
    sigma = module(torch.zeros(64, 1), None, torch.arange(64))[1]
    found, counts = sigma.unique(return_counts=True)
    torch.testing.assert_close(found, levels[:-1].flip(0).float())
    assert counts.max() - counts.min() <= 1  # stratified


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{kind: progressive}", "objective.teacher: kind 'progressive' needs one"),
        ("{kind: progressive, teacher: {checkpoint: t}, sigma_sampling: {kind: log_normal}}", "levels of objective"),
        ("{kind: progressive, teacher: {checkpoint: t}, steps: 0}", "steps is 0"),
        ("{kind: consistency, gap_base: 1}", "gap_base is 1"),
        ("{kind: consistency, num_stages: 0}", "num_stages is 0"),
        ("{kind: consistency, teacher: {checkpoint: t, guidance: many}}", "should be a weight, or .lowest, highest."),
        ("{kind: consistency, teacher: {checkpoint: t, guidance: [4, 1]}}", "lowest weight must be below the highest"),
    ],
)  # fmt: skip
def test_what_a_config_says_of_few_steps_is_refused_in_one_line_where_it_makes_no_sense(objective, said):
    minimal = {"run": {"name": "a", "storage": "s"}, "data": {"url": "d"}, "duration": {"images": 1000}}
    with pytest.raises(UserError, match=said) as raised:
        load_config(minimal, [f"objective={objective}"])
    assert "\n" not in str(raised.value)
