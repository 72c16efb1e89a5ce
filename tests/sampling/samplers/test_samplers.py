"""What holds for every sampler: exact nfe, dtype, rows that do not know of each other, refusals."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import ScorerayError, UserError
from scoreray.data.yaml_text import parse_options
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.options import check_options, option_words, options_of
from scoreray.sampling.samplers.sample import ADAPTIVE, SAMPLERS, SamplerState, drive, num_calls, sample, start
from scoreray.sampling.samplers.sigmas import karras

N = 9
GRID = karras(N, 0.02, 10.0)
SMALL = {"ncsn": {"num_steps": 3}, "ncsnv2": {"num_steps": 3}}  # options that keep a run short
CALLS = {
    "langevin": N,
    "sgld": N,
    "ncsn": 3 * N,
    "ncsnv2": 3 * N + 1,
    "baoab": N + 1,
    "cld": N,
    "mala": 2 * N + 1,
    "hmc": 5 * 2 * N + 1,
    "ddpm": N,
    "ddim": N,
    "reverse_sde": N,
    "predictor_corrector": N + (N - 1),
    "euler": N,
    "heun": 2 * N - 1,
    "edm_sde": 2 * N - 1,
    "dpm2": 2 * N - 1,
    "dpmpp_2m": N,
    "dpmpp_2m_sde": N,
    "dpmpp_3m_sde": N,
    "unipc": N,
    "consistency": N,
    "flow_map": N,
}
SEEDS = torch.tensor([3, 14, 15, 92, 6])


def draw(rows: torch.Tensor | list[int], shape=(2,), dtype=torch.float64) -> torch.Tensor:
    return 10.0 * SampleNoise(rows).normal((len(rows), *shape), dtype)


class Counted:
    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, x, sigma, class_labels=None):
        self.calls += 1
        assert sigma.shape == (len(x),)
        assert (sigma > 0).all()
        return self.denoiser(x, sigma)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_number_of_network_calls_is_exact(name, mixture):
    counted = Counted(mixture)
    x = draw(SEEDS)
    _, nfe = drive(start(name, x, GRID, SEEDS, **SMALL.get(name, {})), counted)
    assert counted.calls == nfe
    if name in ADAPTIVE:
        assert (nfe - 2) % 6 == 0
        assert nfe > 20
    else:
        assert nfe == CALLS[name] == num_calls(name, GRID, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_and_what_the_network_sees_keep_the_dtype(name, dtype, gaussian):
    seen = set()

    def denoiser(x, sigma, condition=None):
        seen.add((x.dtype, sigma.dtype))
        return gaussian(x, sigma)

    options = {"rtol": 1e-2, "atol": 1e-2} if name in ADAPTIVE else SMALL.get(name, {})
    x = draw(SEEDS, (3, 2, 2), dtype)
    samples = sample(denoiser, x, GRID, sampler=name, generator=SEEDS, **options)
    assert samples.dtype == dtype
    assert samples.shape == x.shape
    assert seen == {(dtype, torch.float64 if dtype == torch.float64 else torch.float32)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_alone_is_bitwise_the_row_of_its_batch(name, mixture):
    options = SMALL.get(name, {})
    x = draw(SEEDS)
    together = sample(mixture, x, GRID, sampler=name, generator=SEEDS, **options)
    for i in range(len(SEEDS)):
        alone = sample(mixture, x[i : i + 1], GRID, sampler=name, generator=SEEDS[i : i + 1], **options)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize(("name", "per_level"), {"baoab": 4, "cld": 3, "mala": 10, "hmc": 13}.items())
def test_down_the_ladder_the_calls_of_every_level_are_counted_and_rows_stay_alone(name, per_level, mixture):
    options = {"anneal": True, "num_steps": 3} | {"mala": {"line_calls": 2}, "hmc": {"num_leapfrogs": 4}}.get(name, {})
    if name == "hmc":
        options["line_calls"] = 0
    counted = Counted(mixture)
    x = draw(SEEDS)
    together, nfe = drive(start(name, x, GRID, SEEDS, **options), counted)
    assert counted.calls == nfe == per_level * N == num_calls(name, GRID, **options)
    _, denoising = drive(start(name, x, GRID, SEEDS, denoise=True, **options), counted)
    assert denoising == nfe + (name == "cld")  # the others know the last state's denoised batch
    for i in range(len(SEEDS)):
        assert torch.equal(
            drive(start(name, x[i : i + 1], GRID, SEEDS[i : i + 1], **options), mixture)[0][0], together[i]
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_leaves_alone_the_tensors_it_was_given_and_has_yielded(name, mixture):
    x = draw(SEEDS)
    kept = []
    sample(
        mixture, x, GRID, sampler=name, generator=SEEDS, **SMALL.get(name, {}),
        callback=lambda p: kept.extend([(p.x, p.x.clone()), (p.denoised, p.denoised.clone())]),
    )  # fmt: skip
    assert torch.equal(x, draw(SEEDS))
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_one_step_grid_works_and_one_from_far_ends_in_the_denoised_batch(name, gaussian):
    samples = sample(gaussian, draw(SEEDS), [10.0, 0.0], sampler=name, generator=SEEDS, **SMALL.get(name, {}))
    assert torch.isfinite(samples).all()
    if name not in {"langevin", "sgld", "ncsn", "ncsnv2", "baoab", "cld", "mala", "hmc", "edm_sde"}:
        torch.testing.assert_close(samples, gaussian(draw(SEEDS), torch.full((5,), 10.0)))


def test_the_same_seeds_give_the_same_samples_and_others_others(mixture):
    x = draw(SEEDS)
    first = sample(mixture, x, GRID, sampler="ddpm", generator=SEEDS)
    assert torch.equal(first, sample(mixture, x, GRID, sampler="ddpm", generator=SEEDS.tolist()))
    assert not torch.isclose(first, sample(mixture, x, GRID, sampler="ddpm", generator=SEEDS + 1)).any()


def test_a_torch_generator_and_a_continued_sample_noise_are_accepted(mixture):
    x = draw(SEEDS)
    a, b = (sample(mixture, x, GRID, sampler="ddpm", generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    noise = SampleNoise(SEEDS)
    start_at = 10.0 * noise.normal((5, 2), torch.float64)
    continued = sample(mixture, start_at, GRID, sampler="ddpm", generator=noise)
    assert torch.equal(continued, sample(mixture, x, GRID, sampler="ddpm", generator=SEEDS))


def test_the_noise_of_a_step_is_never_the_initial_noise():
    noise = SampleNoise([7])
    draws = torch.stack([noise.normal((1, 1000))[0] for _ in range(6)])
    correlations = torch.corrcoef(draws) - torch.eye(6)
    assert correlations.abs().max() < 5 / math.sqrt(1000)


def test_draws_ahead_are_the_draws_one_by_one_whatever_is_asked_for_between():
    one_by_one, ahead = SampleNoise(SEEDS), SampleNoise(SEEDS)
    ahead.expect(5)
    for shape, dtype in [((2, 3), torch.float32)] * 3 + [((4,), torch.float32)] + [((2, 3), torch.float64)] * 4:
        shape = (len(SEEDS), *shape)
        one_by_one.expect(0)
        assert torch.equal(ahead.normal(shape, dtype), one_by_one.normal(shape, dtype))
    assert ahead.draw == one_by_one.draw == 8


def test_class_labels_reach_the_denoiser_at_every_call(gaussian):
    labels = torch.tensor([0, 1, 2, -1, 5])
    seen = []

    def denoiser(x, sigma, class_labels):
        seen.append(class_labels)
        return gaussian(x, sigma)

    sample(denoiser, draw(SEEDS), GRID, sampler="heun", class_labels=labels)
    assert len(seen) == 2 * N - 1
    assert all(torch.equal(one, labels) for one in seen)


def test_a_callback_sees_every_call_and_its_last_preview_is_the_sample(mixture):
    seen: list[SamplerState] = []
    samples = sample(mixture, draw(SEEDS), GRID, sampler="euler", callback=seen.append)
    assert [p.nfe for p in seen] == list(range(1, N + 1))
    assert [p.sigma for p in seen] == GRID[:-1].tolist()
    assert torch.equal(seen[-1].denoised, samples)


def test_no_graph_is_kept(mixture):
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert not sample(lambda x, s: mixture(x, s) * weight, draw(SEEDS), GRID).requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_names_its_source_and_its_calls(name):
    text = SAMPLERS[name].__doc__
    assert "calls" in text
    assert any(str(year) in text for year in range(1900, 2030))


def test_unknown_names_are_answered_with_the_nearest(gaussian):
    with pytest.raises(UserError, match=r"unknown sampler 'hein'.*did you mean 'heun'"):
        sample(gaussian, draw(SEEDS), GRID, sampler="hein")
    with pytest.raises(UserError, match=r"sampler 'edm_sde' has no option 'schurn'.*did you mean 's_churn'"):
        sample(gaussian, draw(SEEDS), GRID, sampler="edm_sde", schurn=1)
    with pytest.raises(UserError, match=r"sampler 'euler' has no option 'eta': it takes none"):
        sample(gaussian, draw(SEEDS), GRID, sampler="euler", eta=1)
    with pytest.raises(UserError, match=r"did you mean 'midpoint'"):
        sample(gaussian, draw(SEEDS), GRID, sampler="dpmpp_2m_sde", solver="midpont")


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("ddim", {"eta": 1.5}, r"eta = 1.5: must be a number in \[0, 1\]"),
        ("ddim", {"eta": math.nan}, "eta = nan"),
        ("ddim", {"eta": "1"}, "eta = '1'"),
        ("ddim", {"eta": True}, "eta = True"),
        ("rk45", {"rtol": 0}, r"rtol = 0: must be a number in \[1e-14, 1\]"),
        ("unipc", {"order": 4}, r"order = 4: must be an integer in \[1, 3\]"),
        ("unipc", {"order": 1.5}, "order = 1.5"),
        ("langevin", {"num_steps": 0}, "num_steps = 0: must be an integer in .* or none"),
        ("langevin", {"denoise": 1}, "denoise = 1: must be true or false"),
        ("ncsn", {"epsilon": -1e-5}, "epsilon = -1e-05"),
        ("edm_sde", {"s_noise": 0}, "s_noise = 0"),
    ],
)
def test_options_out_of_range_are_refused_with_value_and_range(name, options, what, gaussian):
    with pytest.raises(UserError, match=what):
        sample(gaussian, draw(SEEDS), GRID, sampler=name, **options)


EXTREMES: list[Any] = [
    1e300, -1, 0, 0.0, math.nan, math.inf, -math.inf, 1e-320, 5e-324, 1e-45, 10**400, -(10**400), 2**63, 3.5e38, True,
    False, "", "1", "nan", "x" * 1000, None, [], {}, [1], 1, 2, 0.5, 100.0, 1e-10, 1e10, b"1",
]  # fmt: skip
OPTIONS = [(name, option) for name, sampler in SAMPLERS.items() for option in options_of(sampler)]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_value_of_any_option_is_refused_or_gives_finite_samples(name, option, dtype, gaussian):
    """In float32 too, where PyTorch raises on a coefficient beyond 3.4e38. Only steps may turn out to be too large."""
    x = 10.0 * SampleNoise(SEEDS).normal((len(SEEDS), 2), dtype)
    for value in EXTREMES:
        options = {**(SMALL.get(name, {}) if option != "num_steps" else {}), option: value}
        said = ""
        try:
            samples = sample(gaussian, x, GRID, sampler=name, generator=SEEDS, **options)
            assert torch.isfinite(samples).all()
        except UserError as error:
            said = str(error)
        if said:
            assert said.startswith(f"{option} = ") or (option in ("step_size", "epsilon") and value >= 0.5)
            assert len(said) < 250


def test_every_number_that_a_sampler_takes_has_finite_bounds():
    numbers = [options_of(SAMPLERS[name])[option] for name, option in OPTIONS]
    numbers = [option for option in numbers if option.kind in (int, float)]
    assert len(numbers) > 20
    assert all(math.isfinite(option.bounds.low) and math.isfinite(option.bounds.high) for option in numbers)
    assert all(option.default is None or option.default in option.bounds for option in numbers)


def test_options_of_a_command_line_are_numbers_as_everywhere():
    words = ["rtol=1e-3", "max_steps=010", "atol=.5", "denoise=true", "solver=heun", "process=null", "rtol=1E-4"]
    options = parse_options(words)
    assert options == {
        "rtol": 1e-4, "max_steps": 10, "atol": 0.5, "denoise": True, "solver": "heun", "process": None
    }  # fmt: skip
    assert check_options("rk45", SAMPLERS["rk45"], parse_options(["rtol=1e-3", "max_steps=1e3"])) == {
        "rtol": 1e-3, "max_steps": 1000
    }  # fmt: skip
    given = {"a": 1e-05, "b": True, "c": None, "d": "heun", "e": "1e-3", "f": 7, "g": "a b'\"", "h": "", "i": "no: #"}
    assert parse_options(option_words(given)[1::2]) == given
    assert shlex.split(shlex.join(option_words(given)))[::2] == ["--option"] * len(given)


@pytest.mark.parametrize(
    "word", ["x", "=1", "x=[1", "x={", "x=%40", "x=@1", "x=*x", "x=!!int a", "x=" + "9" * 5000, "x=&"]
)
def test_an_option_that_can_t_be_read_is_named(word):
    with pytest.raises(UserError, match=f"^--option {re.escape(word[:40])}"):
        parse_options([word])


def test_an_integer_is_taken_where_a_number_is_asked_and_a_whole_number_where_an_integer_is(gaussian):
    assert options_of(SAMPLERS["ddim"])["eta"].check(1) == 1.0
    assert isinstance(options_of(SAMPLERS["unipc"])["order"].check(2.0), int)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.tensor(1.0), r"x of shape \[\]"),
        (torch.zeros(0, 2), "at least one row"),
        (torch.zeros(5, 2, dtype=torch.int64), "floating point"),
        (torch.full((5, 2), math.nan), "not finite"),
        (torch.full((5, 2), math.inf), "not finite"),
    ],
)
def test_a_bad_state_is_refused(x, what, gaussian):
    with pytest.raises(UserError, match=what):
        sample(gaussian, x, GRID)


def test_a_bad_grid_is_refused(gaussian):
    with pytest.raises(UserError, match="descend"):
        sample(gaussian, draw(SEEDS), [1.0, 2.0, 0.0])


def test_seeds_and_labels_must_match_the_rows(gaussian):
    with pytest.raises(UserError, match="4 seeds for 5 rows"):
        sample(gaussian, draw(SEEDS), GRID, generator=SEEDS[:4])
    with pytest.raises(UserError, match=r"seeds of shape \[5\], torch.float32"):
        sample(gaussian, draw(SEEDS), GRID, generator=SEEDS.float())
    with pytest.raises(UserError, match=r"class_labels of shape \[4\]"):
        sample(gaussian, draw(SEEDS), GRID, class_labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="class label -2"):
        sample(gaussian, draw(SEEDS), GRID, class_labels=torch.full((5,), -2))


def test_a_denoiser_that_changes_shape_or_dtype_is_refused(gaussian):
    with pytest.raises(UserError, match="must keep shape and dtype"):
        sample(lambda x, s: x[:, :1], draw(SEEDS), GRID)
    with pytest.raises(UserError, match="must keep shape and dtype"):
        sample(lambda x, s: x.float(), draw(SEEDS), GRID)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_denoiser_that_gives_nan_is_reported_with_the_row(name, gaussian):
    def broken(x, sigma, condition=None):
        denoised = gaussian(x, sigma)
        denoised[2] = math.nan
        return denoised

    options = {"max_steps": 30} if name in ADAPTIVE else SMALL.get(name, {})
    with pytest.raises(ScorerayError, match=r"rows \[2\]"):
        sample(broken, draw(SEEDS), GRID, sampler=name, generator=SEEDS, **options)


def test_an_adaptive_samplers_calls_are_not_promised():
    with pytest.raises(UserError, match="not known before"):
        num_calls("rk45", GRID)


MISTAKEN = """
def raises(x, sigmas, noise):
    yield x, sigmas[0]
    raise ValueError("boom")

def narrow(x, sigmas, noise):
    yield x[:, :1], sigmas[0]

def nothing(x, sigmas, noise):
    yield x, sigmas[0]

def half(x, sigmas, noise):
    denoised = yield x, sigmas[0]
    return denoised[:1]

def level(x, sigmas, noise):
    yield x

def untyped(x, sigmas, noise, *, a):
    return (yield x, sigmas[0])
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "failed: ValueError: boom"),
        ("narrow", r"must yield \(x \[4, 2\] torch.float32, sigma\), not \(\[4, 1\] torch.float32, float\)"),
        ("nothing", r"must return the samples, \[4, 2\] torch.float32, not NoneType"),
        ("half", r"must return the samples, \[4, 2\] torch.float32, not \[1, 2\] torch.float32"),
        ("level", r"must yield \(x \[4, 2\] torch.float32, sigma\), not \[4, 2\] torch.float32"),
        ("untyped", "its options can't be read from its signature: TypeError: option 'a' has no type"),
    ],
)
def test_the_mistakes_of_somebody_elses_sampler_are_one_line(
    own_package: Callable[..., Path], name: str, message: str
) -> None:
    own_package("wrong", parts=MISTAKEN)
    with pytest.raises(UserError, match=f"^sampler 'wrong.parts:{name}'.*{message}"):
        sample(lambda x, sigma: x / 2, torch.ones(4, 2), [2.0, 1.0, 0.0], sampler=f"wrong.parts:{name}")
