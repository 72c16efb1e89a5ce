"""Noise levels follow their laws, are functions of (seed, position), and stratify when asked."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
import torch
from pydantic import Field, TypeAdapter
from scipy import stats

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.process import DDPM, EDM, PROCESSES, VE, VP, FlowMatching
from scoreray.trainer.diffusion.sigma_sampling import (
    SIGMA_SAMPLINGS,
    LadderUniform,
    LikelihoodSampling,
    LogitNormal,
    LogNormal,
    LogUniform,
    SigmaSampling,
    UniformT,
    sample_sigma,
)
from scoreray.trainer.diffusion.weighting import LikelihoodWeighting

F64 = torch.float64
POSITIONS = torch.arange(20_000)
every_sampling = pytest.mark.parametrize("sampling", [cls() for cls in SIGMA_SAMPLINGS.values()], ids=lambda s: s.kind)


def draw(sampling, process, positions=POSITIONS, batch=256):
    return sample_sigma(sampling, process, 7, positions, batch, F64)


def assert_law(values, cdf):
    assert stats.kstest(values.numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("stratified", [False, True])
def test_each_law_is_the_one_it_names(stratified):
    assert_law(draw(LogNormal(stratified=stratified), EDM()).log(), stats.norm(-1.2, 1.2).cdf)
    uniform = stats.uniform(math.log(0.002), math.log(40_000))
    assert_law(draw(LogUniform(stratified=stratified), EDM()).log(), uniform.cdf)
    assert_law(VP().time(draw(UniformT(stratified), VP())), stats.uniform(1e-5, 1 - 1e-5).cdf)
    t = FlowMatching().time(draw(LogitNormal(0.5, 0.8, stratified), FlowMatching()))
    assert_law(torch.logit((t - 1e-3) / 0.998), stats.norm(0.5, 0.8).cdf)


@pytest.mark.parametrize("process", [cls() for cls in PROCESSES.values()], ids=lambda p: p.kind)
def test_likelihood_sampling_is_in_proportion_to_the_diffusion_over_the_variance_at_t(process):
    """Its density of t, 1 / (dt / du), is a constant times g^2 / sigma^2; the constant is 1 / Z of `importance`."""
    u, step = torch.linspace(0.02, 0.98, 49, dtype=F64), 1e-5
    at = lambda v: process.time(LikelihoodSampling().quantile(v, process))  # noqa: E731
    density = 2 * step / (at(u + step) - at(u - step))
    rate = (process.diffusion(at(u)) / process.sigma(at(u))) ** 2
    low, high = process.sigma_range()
    # The DDPM's rate steps from one beta to the next, and a difference may span two of them.
    rtol = 0.02 if process.kind == "ddpm" else 1e-6
    torch.testing.assert_close(density, rate / (2 * math.log(high / low)), rtol=rtol, atol=0)
    factor = LikelihoodSampling().importance(LikelihoodSampling().quantile(u, process), process)
    torch.testing.assert_close(
        factor * density, torch.full_like(u, 1 / (process.t_max - process.t_min)), rtol=rtol, atol=0
    )


@pytest.mark.parametrize("process", [VP(), FlowMatching(), VE(0.01, 50.0), DDPM()], ids=lambda p: p.kind)
def test_under_the_likelihood_weighting_importance_sampling_has_the_mean_of_uniform_t_and_a_constant_factor(process):
    """Gaussian data: the error at r is s^2 r^2 / (s^2 + r^2), and its -dSNR/dt integral is ln((1 + s^2 SNR) ratio)."""
    s2, weighting = 0.25, LikelihoodWeighting()
    sigma = draw(LikelihoodSampling(stratified=True), process)
    factor = weighting.weight(sigma, process, 0.5) * LikelihoodSampling().importance(sigma, process)
    torch.testing.assert_close(factor * sigma**2, (factor * sigma**2)[:1].expand_as(factor), rtol=1e-6, atol=0)
    loss = factor * s2 * sigma**2 / (s2 + sigma**2)
    low, high = process.sigma_range()
    exact = math.log((1 + s2 / low**2) / (1 + s2 / high**2)) / (process.t_max - process.t_min)
    assert loss.mean().item() == pytest.approx(exact, rel=2e-3)


def test_the_ladder_visits_each_level_equally_often():
    levels, counts = draw(LadderUniform(10), VE(0.01, 1.0)).unique(return_counts=True)
    torch.testing.assert_close(levels, VE(0.01, 1.0).ladder(10).flip(0))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    steps = draw(LadderUniform(1000), DDPM()).unique()
    assert torch.isin(steps.float(), DDPM().ladder(1000).float()).float().mean() > 0.99


@every_sampling
def test_a_sigma_is_a_function_of_its_position(sampling):
    for config in (sampling, type(sampling)(stratified=True)):
        whole = draw(config, VP())
        parts = torch.cat([draw(config, VP(), part) for part in POSITIONS.split(333)])
        assert torch.equal(whole, parts)
        assert (whole > 0).all()
        assert whole.isfinite().all()


@every_sampling
@pytest.mark.parametrize("process", [cls() for cls in PROCESSES.values()], ids=lambda p: p.kind)
def test_quantiles_rise_and_every_process_serves_every_sampling(sampling, process):
    u = torch.linspace(1e-6, 1 - 1e-6, 999, dtype=F64)
    sigma = sampling.quantile(u, process)
    assert (sigma.diff() >= 0).all()
    if sampling.kind != "log_normal":  # the one whose law the process does not bound
        low, high = process.sigma_range()
        assert low * (1 - 1e-9) <= sigma[0]
        assert sigma[-1] <= high * (1 + 1e-9)


def test_a_stratified_batch_has_one_sample_in_each_stratum():
    for batch in range(5):
        positions = torch.arange(batch * 64, (batch + 1) * 64)
        u = torch.special.ndtr((draw(LogNormal(stratified=True), EDM(), positions, 64).log() + 1.2) / 1.2)
        gaps = u.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 64), rtol=0, atol=1e-9)


def test_stratified_sampling_lowers_the_error_of_a_batch_mean_by_the_root_of_the_batch_size():
    """Of 64 uniforms the mean has a deviation of 1 / (8 sqrt 12); stratified, only the common shift is left: / 64."""
    deviation = {}
    for stratified in (False, True):
        sigma = draw(LogUniform(1.0, math.e, stratified), EDM(), torch.arange(64_000), 64)
        deviation[stratified] = sigma.log().reshape(1000, 64).mean(1).std().item() * math.sqrt(12)
    assert deviation[False] == pytest.approx(1 / 8, rel=0.1)
    assert deviation[True] == pytest.approx(1 / 64, rel=0.1)


def test_configs_are_chosen_by_kind_and_checked():
    union = TypeAdapter(Annotated[SigmaSampling, Field(discriminator="kind")])
    for name in SIGMA_SAMPLINGS:
        assert union.validate_python({"kind": name, "stratified": True}).stratified
    for make, message in [
        (lambda: LogNormal(P_std=0.0), "P_std is 0.0"),
        (lambda: LogUniform(3.0, 2.0), "sigma_min is 3.0"),
        (lambda: LadderUniform(1), "num_levels is 1"),
    ]:
        with pytest.raises(UserError, match=message):
            make()
