"""Underdamped Langevin, MALA and HMC against exact laws: Gaussian chains by their matrices, mixtures in balance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.dynamics import LOBATTO
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import sample

SIGMA = 0.4
LEVEL = [1.0, SIGMA, 0.0]


class Impulses:
    """Draw number i is 1 in row i and 0 in the others: a linear chain's ends are its weights of each draw."""

    def __init__(self):
        self.draw = 0

    def like(self, x):
        drawn = torch.zeros_like(x)
        if self.draw < len(x):
            drawn[self.draw] = 1
        self.draw += 1
        return drawn


def variance_of_chain(name, kept, draws, **options):
    """Of the end of a chain whose denoiser is D(x) = kept x, begun at 0: exact, by its weights of all draws."""
    x = torch.zeros(draws, 1, dtype=torch.float64)
    end = sample(lambda x, sigma: kept * x, x, LEVEL, sampler=name, generator=Impulses(), **options)
    return end.square().sum().item()


@pytest.mark.parametrize("time_step", [0.25, 1.0, 1.9])
@pytest.mark.parametrize("std", [0.0, 0.3, 1.0])
def test_positions_of_baoab_are_exact_for_gaussian_data_at_any_stable_step(std, time_step):
    """Leimkuhler & Matthews 2013: s^2 + sigma^2 whatever the step is; Langevin's is v / (1 - eps / (2 v))."""
    variance, steps = std**2 + SIGMA**2, 600
    found = variance_of_chain(
        "baoab", std**2 / variance, steps + 1, time_step=time_step, num_steps=steps, friction=1.0
    )  # fmt: skip
    assert found == pytest.approx(variance, rel=1e-9)
    eps = time_step**2 / 2 * SIGMA**2
    steps = max(200, math.ceil(6 * variance / eps))
    first_order = variance_of_chain("langevin", std**2 / variance, steps, step_size=eps, num_steps=steps)
    assert first_order == pytest.approx(variance / (1 - eps / (2 * variance)), rel=1e-3)
    assert abs(first_order - variance) > 0.01 * time_step**2 * variance / (1 + (std / SIGMA) ** 2)


def test_cld_is_exact_where_the_denoised_sample_does_not_change_and_of_order_2_elsewhere():
    for time_step in (0.25, 1.0, 2.0):
        assert variance_of_chain("cld", 0.0, 400, time_step=time_step, num_steps=100) == pytest.approx(SIGMA**2)
    kept = 0.9
    errors = [
        abs(variance_of_chain("cld", kept, 4 * n, time_step=h, num_steps=n) * (1 - kept) / SIGMA**2 - 1)
        for h, n in ((0.5, 700), (0.25, 1400))
    ]
    assert errors[0] < 0.005
    assert errors[0] / errors[1] > 4


def test_without_a_force_the_noise_of_underdamped_langevin_diffuses_by_2_t_over_friction():
    """sqrt(2 friction) dw on the velocity is sqrt(2 / friction) dw on the position: Einstein's relation."""
    friction, time_step, steps = 4.0, 0.05, 4000
    x = torch.zeros(steps + 1, 1, dtype=torch.float64)
    end = sample(
        lambda x, sigma: x, x, LEVEL, sampler="baoab", generator=Impulses(),
        friction=friction, time_step=time_step, num_steps=steps,
    )  # fmt: skip
    elapsed = steps * time_step
    exact = 2 / friction * (elapsed - -math.expm1(-friction * elapsed) / friction) * SIGMA**2
    assert end.square().sum().item() == pytest.approx(exact, rel=0.005)  # its step's own (friction h)^2 / 12 is 0.3%


MEANS, WEIGHTS, STD = torch.tensor([-0.8, 0.7], dtype=torch.float64), torch.tensor([0.35, 0.65]).double(), 0.2
VARIANCE = STD**2 + SIGMA**2
COUNT = 20_000


def on_the_line(x, sigma):
    """The denoiser of a mixture on the line, at any level."""
    variance = (STD**2 + sigma**2).view(-1, 1)
    posterior = (WEIGHTS.log() - (x - MEANS).square() / (2 * variance)).softmax(1)
    center = (posterior * MEANS).sum(1, keepdim=True)
    return center + (x - center) * (STD**2 / variance)


def exact_draws():
    numbers = SampleNoise(range(COUNT)).normal((COUNT, 2), torch.float64)
    which = (torch.special.ndtr(numbers[:, :1]) > WEIGHTS[0]).long()
    return MEANS[which] + math.sqrt(VARIANCE) * numbers[:, 1:]


def distribution(x):
    return sum(w * norm.cdf(x, m, math.sqrt(VARIANCE)) for w, m in zip(WEIGHTS.tolist(), MEANS.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "num_steps"),
    [
        ("mala", {"step_size": 1.5 * SIGMA**2, "line_calls": 2}, 4),
        ("hmc", {"time_step": 1.7, "num_leapfrogs": 3, "line_calls": 2}, 3),
    ],
)
def test_mala_and_hmc_leave_a_mixture_as_it_is_and_move_there_and_back_alike(name, options, num_steps):
    """From exact samples: the law stays, and of pairs (before, after) as many go from one bin to another as back."""
    start = exact_draws()
    noise = SampleNoise(range(COUNT), draw=1)
    end = sample(on_the_line, start, LEVEL, sampler=name, generator=noise, num_steps=num_steps, **options)
    rate = noise.acceptance.accepted / noise.acceptance.proposed
    assert noise.acceptance.proposed == COUNT * num_steps
    assert 0.3 < rate < 0.95  # the rejections do something
    assert kstest(end[:, 0].numpy(), distribution).pvalue > 1e-3
    bins = torch.tensor([-1.2, -0.6, 0.0, 0.5, 1.0], dtype=torch.float64)
    single = sample(on_the_line, start, LEVEL, sampler=name, generator=SampleNoise(range(COUNT), draw=1), num_steps=1,
                    **options)  # fmt: skip
    pairs = torch.bucketize(start[:, 0], bins) * 6 + torch.bucketize(single[:, 0], bins)
    flow = torch.bincount(pairs, minlength=36).view(6, 6).double()
    z = (flow - flow.T) / (flow + flow.T).clamp_min(1).sqrt()
    assert z.abs().max() < 4
    assert (flow > 20).sum() > 20  # most pairs of bins are seen


def test_what_mala_corrects_is_seen_without_it():
    start = exact_draws()
    noise = SampleNoise(range(COUNT), draw=1)
    end = sample(on_the_line, start, LEVEL, sampler="langevin", generator=noise, step_size=1.5 * SIGMA**2, num_steps=4)
    assert kstest(end[:, 0].numpy(), distribution).pvalue < 1e-6


@pytest.mark.parametrize(("num_leapfrogs", "time_step"), [(1, 0.55), (4, 0.3), (5, 0.6)])
def test_acceptance_on_a_gaussian_is_the_known_rate_of_many_dimensions(num_leapfrogs, time_step, make_gaussian):
    """The energy's error is N(mu, 2 mu) then, so the rate is erfc(sqrt(mu) / 2) (Beskos 2013, theorem 3.6)."""
    dims, rows, h = 1000, 200, time_step
    step = np.array([[1 - h**2 / 2, h], [-h + h**3 / 4, 1 - h**2 / 2]])  # a leapfrog of (x, v)
    stretch = np.linalg.matrix_power(step, num_leapfrogs)
    mu = dims * h**2 / 8 * (np.square(stretch[0]).sum() - 1)
    noise = SampleNoise(range(rows))
    x = 1 + SIGMA * noise.normal((rows, dims), torch.float64)
    options = (
        {"time_step": h, "num_leapfrogs": num_leapfrogs} if num_leapfrogs > 1 else {"step_size": (h * SIGMA) ** 2 / 2}
    )
    sample(
        make_gaussian(1.0, 0.0), x, LEVEL, sampler="hmc" if num_leapfrogs > 1 else "mala", generator=noise,
        num_steps=8, line_calls=0, **options,
    )  # fmt: skip
    rate = noise.acceptance.accepted / noise.acceptance.proposed
    assert rate == pytest.approx(math.erfc(math.sqrt(mu) / 2), abs=4 * 0.5 / math.sqrt(8 * rows) + 0.01)
    assert 0.3 < rate < 0.97


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_small_steps_are_accepted_and_a_proposal_that_explodes_is_not(name):
    small = {"mala": {"step_size": 1e-6}, "hmc": {"time_step": 1e-3}}[name]
    noise = SampleNoise(range(500), draw=1)
    sample(on_the_line, exact_draws()[:500], LEVEL, sampler=name, generator=noise, num_steps=4, **small)
    assert noise.acceptance.accepted == noise.acceptance.proposed == 2000

    def cliff(x, sigma):  # finite where the chain is, infinite away from it
        return torch.where(x.abs() < 1e-9, x, math.inf)

    x = torch.zeros(3, 1, dtype=torch.float64)
    assert torch.equal(sample(cliff, x, LEVEL, sampler=name, generator=[1, 2, 3]), x)
    with pytest.raises(UserError, match="not finite in rows"):
        sample(lambda x, sigma: x * math.nan, x, LEVEL, sampler=name, generator=[1, 2, 3])


@pytest.mark.parametrize("line_calls", range(4))
def test_line_integrals_are_exact_for_scores_of_their_degree(line_calls):
    nodes, end, inner = LOBATTO[line_calls]
    for degree in range(2 * line_calls + 2):
        found = end * 0.0**degree + end + sum(w * t**degree for t, w in zip(nodes, inner, strict=True))
        assert found == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_default_steps_are_accepted_about_as_often_in_one_dimension_as_in_thousands(make_gaussian):
    for name in ("mala", "hmc"):
        for dims in (1, 3000):
            noise = SampleNoise(range(100))
            x = SIGMA * noise.normal((100, dims), torch.float32)
            sample(make_gaussian(0.0, 0.0), x, LEVEL, sampler=name, generator=noise, num_steps=4)
            assert 0.55 < noise.acceptance.accepted / noise.acceptance.proposed < 0.95
