"""Noise grids: the papers' constants, the shape every grid has, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.sigmas import (
    GRIDS,
    as_grid,
    from_process,
    geometric,
    grid,
    grid_text,
    interior,
    karras,
    linear,
    parse_grid,
)
from scoreray.trainer.diffusion.process import DDPM, PROCESSES, VE, VP, FlowMatching


def test_karras_grid_of_18_has_the_published_levels():
    sigmas = karras(18, 0.002, 80.0, 7.0).tolist()
    assert sigmas[:5] == pytest.approx([80, 57.586, 40.7856, 28.3746, 19.3525], rel=3e-6)
    assert sigmas[-4:] == pytest.approx([0.0229345, 0.00752802, 0.002, 0], rel=3e-6)


def test_geometric_grid_has_one_ratio_which_for_cifar_ncsnv2_is_1_037():
    sigmas = geometric(232, 0.01, 50.0)
    ratios = sigmas[:-2] / sigmas[1:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 5000 ** (1 / 231)), rtol=1e-12, atol=0)
    assert ratios[0].item() == pytest.approx(1.03755, abs=1e-4)


def test_ncsn_ladder_is_ten_levels_from_1_to_a_hundredth():
    sigmas = geometric(10, 0.01, 1.0)
    assert sigmas[0] == 1.0
    assert sigmas[9] == 0.01
    assert sigmas[1].item() == pytest.approx(0.01 ** (1 / 9), rel=1e-12)


def test_linear_grid_is_karras_at_rho_1():
    torch.testing.assert_close(linear(30, 0.01, 5.0), karras(30, 0.01, 5.0, rho=1.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 3, 18, 1000])
def test_every_grid_is_float64_descends_to_0_and_holds_its_exact_ends(name, n):
    sigmas = grid(name, n, 0.002, 80.0)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (n + 1,)
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert sigmas[-1] == 0
    assert sigmas[0] == 80.0
    assert n == 1 or (sigmas[-2] == 0.002) == (name != "interior")  # whose promise is that it never goes that low


@pytest.mark.parametrize("n", [1, 2, 3, 18])
def test_interior_is_karras_without_its_smallest_level(n):
    sigmas, longer = interior(n, 0.002, 80.0).tolist(), karras(n + 1, 0.002, 80.0).tolist()
    assert sigmas == [*longer[:-2], 0]
    assert n != 2 or sigmas == pytest.approx([80, 2.5152, 0], rel=1e-4)


@pytest.mark.parametrize("given", ["80,0.8", "80, 0.8, 0", [80, 0.8], (80.0, 0.8, 0.0)])
def test_levels_are_a_grid_as_a_word_a_list_or_a_tuple(given):
    assert parse_grid(given) == (80.0, 0.8)
    assert grid(given, 2, 0.002, 40.0).tolist() == [80, 0.8, 0]
    assert parse_grid(grid_text(parse_grid(given))) == parse_grid(given)


def test_one_level_is_a_grid_and_a_word_is_a_name():
    assert parse_grid("80") == (80.0,)
    assert parse_grid("karras") == grid_text("karras") == "karras"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.8,80", "0.8 is followed by 80"),
        ("80,80", "must descend"),
        ("80,0,0.8", "noise level 0"),
        ("80,nan", "noise level nan"),
        ("0", "noise level 0"),
        ("80,-1", "noise level -1"),
        ("1e30", "noise level 1e"),
        ("80,x", "write a name, or noise levels"),
        ([], "must be noise levels"),
        ([80, True], "must be noise levels"),
        ([80, "x"], "must be noise levels"),
        ([10**400], "noise level 1000"),
    ],
)
def test_levels_that_are_no_grid_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        parse_grid(given)


def test_from_process_steps_evenly_in_time_between_the_processs_ends():
    sigmas = from_process(VE(0.01, 50.0), 5)
    times = torch.log(sigmas[:-1] / 0.01) / math.log(5000)
    torch.testing.assert_close(times, torch.linspace(1, 1e-5, 5, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert from_process(VE(0.01, 50.0), 5, t_min=0.5)[-2].item() == pytest.approx(0.01 * math.sqrt(5000))


def test_from_process_ends_vp_at_a_thousandth_and_holds_the_ddpm_ladder():
    vp = from_process(VP(), 10)
    assert vp[0].item() == pytest.approx(0.99997841 / 0.00657159, rel=1e-6)
    assert VP().time(vp[-2]).item() == pytest.approx(1e-3)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    ladder = ((1 - alpha_bar) / alpha_bar).sqrt().flip(0)
    torch.testing.assert_close(from_process(DDPM(), 1000)[:-1], ladder, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", PROCESSES.values())
def test_every_process_makes_a_grid(process):
    sigmas = from_process(process(), 20)
    assert sigmas.shape == (21,)
    assert (sigmas[1:] < sigmas[:-1]).all()


def test_times_outside_the_process_are_refused():
    with pytest.raises(UserError, match="t_max = 2"):
        from_process(VP(), 10, t_max=2.0)
    with pytest.raises(UserError, match="t_min = 0"):
        from_process(FlowMatching(), 10, t_min=0.0)


@pytest.mark.parametrize("n", [0, -1, 2.5, True, 10**9])
def test_a_count_of_steps_that_is_none_is_refused(n):
    with pytest.raises(UserError, match="number of steps"):
        karras(n)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (2.0, 1.0), (1.0, 1.0), (0.1, math.inf), (math.nan, 1)]
)
@pytest.mark.parametrize("name", GRIDS)
def test_ends_that_are_not_positive_ordered_and_finite_are_refused(name, low, high):
    with pytest.raises(UserError, match="0 < sigma_min < sigma_max"):
        grid(name, 10, low, high)


def test_rho_must_be_positive():
    with pytest.raises(UserError, match="rho = 0"):
        karras(10, rho=0)


def test_an_unknown_grid_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown noise grid 'karas'.*did you mean 'karras'"):
        grid("karas", 10, 0.1, 1.0)


@pytest.mark.parametrize(
    ("levels", "what"),
    [
        ([0.0, 1.0, 2.0], "end in 0"),
        ([1.0, 2.0, 0.0], r"sigmas\[0\] = 1 is followed by 2"),
        ([2.0, 2.0, 0.0], "descend strictly"),
        ([2.0, math.nan, 0.0], "finite"),
        ([math.inf, 1.0, 0.0], "finite"),
        ([2.0, -1.0, 0.0], "positive"),
        ([2.0, 0.0, 0.0], "positive"),
        ([0.0], "at least two"),
        ([[2.0, 0.0]], "one-dimensional"),
    ],
)
def test_levels_that_do_not_descend_to_0_are_refused_with_the_value(levels, what):
    with pytest.raises(UserError, match=what):
        as_grid(levels)
