"""Scores of codes whose scores are known: the factors themselves, one that holds all, rotated ones, noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as theirs

from scoreray.data.errors import UserError
from scoreray.sampling.representations.clusters import cluster_scores
from scoreray.sampling.representations.information import (
    modularity,
    mutual_information,
    mutual_information_gap,
)
from scoreray.sampling.representations.labelled import CodeScore, Factor, LabelledCodes, equal_bins, held_out
from scoreray.sampling.representations.pairs import beta_vae_score, factor_vae_score
from scoreray.sampling.representations.predictors import attribute_predictability, dci
from scoreray.sampling.representations.probe import linear_probe

VALUES = (3, 4, 5)
RNG = np.random.default_rng(0)
GRID = np.stack(np.meshgrid(*map(np.arange, VALUES), indexing="ij"), -1).reshape(-1, 3)
KNOWN = np.tile(GRID, (40, 1)).astype(float)
"""Every combination of three independent factors as often: 2,400 samples."""
CLASSES = tuple(Factor(name, KNOWN[:, i], VALUES[i]) for i, name in enumerate(("shape", "size", "colour")))
NUMBERS = tuple(Factor(name, RNG.uniform(-1, 1, len(KNOWN))) for name in ("x", "y"))
NOISE = RNG.standard_normal((len(KNOWN), 4))
ROTATION = np.linalg.qr(RNG.standard_normal((3, 3)))[0]


def of(codes: np.ndarray, factors: tuple[Factor, ...] = CLASSES) -> LabelledCodes:
    return LabelledCodes(codes, factors)


def values_of(found: CodeScore) -> dict[str, float]:
    return {name: one.value for name, one in found.parts.items()}


def first(count: int, all_of: LabelledCodes) -> LabelledCodes:
    factors = tuple(replace(one, values=one.values[:count]) for one in all_of.factors)
    return LabelledCodes(all_of.codes[:count], factors)


IDENTITY, ONE_FOR_ALL = of(KNOWN), of(KNOWN @ np.array([[20.0], [5.0], [1.0]]))
ROTATED, RANDOM = of((KNOWN - KNOWN.mean(0)) / KNOWN.std(0) @ ROTATION), of(NOISE)


@pytest.mark.parametrize(
    ("score", "options", "rotated", "noise"),
    [
        (mutual_information_gap, {}, 0.6, 0.05),
        (modularity, {}, 0.9, 0.9),  # whichever factor a code without information seems to know best
        (dci, {"trees": "forest"}, 0.6, 0.1),
        (beta_vae_score, {"points": 600, "batch": 32}, 1.0, 1 / 3 + 0.08),  # a linear classifier undoes a rotation
        (factor_vae_score, {"points": 600, "batch": 32}, 1.0, 1 / 3 + 0.08),
    ],
)
def test_a_code_for_each_factor_scores_1_and_rotated_codes_and_noise_less(score, options, rotated, noise):
    count = 300 if score is dci else len(KNOWN)  # trees of more take seconds
    best, mixed, none = (score(first(count, one), **options).estimate.value for one in (IDENTITY, ROTATED, RANDOM))
    assert best == pytest.approx(1, abs=0.01)
    assert mixed <= rotated
    assert none <= noise


def test_one_code_that_holds_all_factors_has_none_of_the_gaps():
    """There is no second best code, so MIG is the whole information; modularity follows from the factors' entropies."""
    gap = mutual_information_gap(ONE_FOR_ALL, bins=60)
    assert gap.estimate.value == pytest.approx(1)
    assert set(gap.parts) == {"shape", "size", "colour"}
    squared = np.log(VALUES) ** 2
    wanted = 1 - (squared.sum() - squared.max()) / squared.max() / 2
    assert modularity(ONE_FOR_ALL, bins=60).estimate.value == pytest.approx(wanted, abs=1e-12)
    found = dci(ONE_FOR_ALL, trees="forest")
    assert (found.estimate.value, values_of(found)["completeness"]) == (
        pytest.approx(0, abs=1e-6),
        1.0,
    )  # one code of all
    assert values_of(found)["informativeness"] == values_of(found)["informativeness of colour"] == 1.0


def test_mig_of_a_factor_in_two_codes_is_the_gap_of_their_information():
    """Both have all of `colour`: a gap of 0 for it, 1 for the others."""
    twice = of(np.concatenate([KNOWN, KNOWN[:, 2:]], 1))
    found = mutual_information_gap(twice)
    assert values_of(found) == pytest.approx({"shape": 1, "size": 1, "colour": 0}, abs=1e-12)
    assert found.estimate.value == pytest.approx(2 / 3)
    found = dci(twice, trees="forest")
    assert found.estimate.value == pytest.approx(1, abs=0.001)  # each code is of one factor
    assert values_of(found)["completeness"] < 0.9


def test_information_is_scikit_learns_and_bins_are_numpys():
    codes = RNG.standard_normal((500, 2))
    binned = equal_bins(codes, 20)
    for column, found in zip(codes.T, binned.T, strict=True):
        edges = np.histogram(column, 20)[1]
        assert np.array_equal(found, np.digitize(column, edges[:-1]) - 1)
    counts = theirs.cluster.contingency_matrix(*binned.T)
    assert mutual_information(counts) == pytest.approx(theirs.mutual_info_score(*binned.T))


def test_sap_of_numbers_is_the_gap_of_squared_correlations():
    values = np.stack([one.values for one in NUMBERS], 1)
    assert attribute_predictability(of(values, NUMBERS)).estimate.value == pytest.approx(1, abs=0.02)
    twice = np.concatenate([values, values[:, :1]], 1)
    found = values_of(attribute_predictability(of(twice, NUMBERS)))
    assert found == pytest.approx({"x": 0, "y": 1}, abs=0.02)
    mixed = (values @ np.array([[0.8, 0.6], [-0.6, 0.8]])) * 3
    rows = held_out(len(values))[1]
    wanted = [np.sort([np.corrcoef(column, known)[0, 1] ** 2 for column in mixed[rows].T]) for known in values[rows].T]
    gaps = values_of(attribute_predictability(of(mixed, NUMBERS)))
    assert gaps == pytest.approx({"x": wanted[0] @ [-1, 1], "y": wanted[1] @ [-1, 1]}, abs=1e-9)


def test_sap_of_two_equal_classes_is_a_half_of_certain_and_chance():
    half = Factor("side", (np.arange(len(KNOWN)) // 2 % 2).astype(float), 2)
    found = attribute_predictability(of(np.concatenate([half.values[:, None], NOISE], 1), (half,)))
    assert found.estimate.value == pytest.approx(0.5, abs=0.05)
    assert attribute_predictability(of(NOISE, (half,))).estimate.value < 0.05


def test_clusters_of_separate_classes_are_them_and_halves_are_homogeneous_alone():
    centres = np.eye(3)[KNOWN[:, 0].astype(int)] * 20 + 0.1 * RNG.standard_normal((len(KNOWN), 3))
    found = cluster_scores(of(centres, CLASSES[:1]))
    assert [found[name].estimate.value for name in found] == pytest.approx([1, 1, 1])
    assert found["v_measure"].estimate.std_error == pytest.approx(0, abs=1e-12)
    # two well separated halves of each class: 6 clusters, of which each is of one class
    centres[:, 0] += 100 * (np.arange(len(KNOWN)) // 60 % 2)
    split = cluster_scores(of(centres, CLASSES[:1]), clusters=6)
    completeness = math.log(3) / math.log(6)
    wanted = [1, completeness, 2 * completeness / (1 + completeness)]
    assert [split[name].estimate.value for name in split] == pytest.approx(wanted, abs=1e-6)
    assert all(cluster_scores(of(NOISE, CLASSES[:1]))[name].estimate.value < 0.01 for name in found)


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    onehot = np.concatenate([np.eye(3)[KNOWN[:, 0].astype(int)], NUMBERS[0].values[:, None]], 1)
    found = linear_probe(of(onehot @ np.linalg.qr(RNG.standard_normal((4, 4)))[0], (CLASSES[0], NUMBERS[0])))
    assert found.estimate.value == pytest.approx(1, abs=1e-3)
    assert found.estimate.std_error is not None
    assert values_of(found)["x"] == pytest.approx(1, abs=1e-3)
    blind = linear_probe(of(NOISE, (CLASSES[0], NUMBERS[0])))
    assert values_of(blind)["shape"] == pytest.approx(1 / 3, abs=0.06)
    assert blind.beside["largest_class"] == pytest.approx(1 / 3, abs=0.06)
    assert values_of(blind)["x"] == pytest.approx(0, abs=0.02)
    assert blind.estimate.value < 0.25


def test_a_probes_r2_is_what_noise_leaves():
    """y = x + noise of a quarter of its variance: R2 = 1 - 1/5 of x + noise."""
    x = RNG.standard_normal(len(KNOWN))
    known = Factor("x", x + 0.5 * RNG.standard_normal(len(x)))
    found = linear_probe(of(x[:, None], (known,))).estimate
    assert found.std_error is not None
    assert abs(found.value - 0.8) < 4 * found.std_error < 0.2


def test_samples_of_unknown_factors_are_left_out_and_mistakes_are_one_line():
    unknown = KNOWN[:, 0].copy()
    unknown[RNG.permutation(len(KNOWN))[: len(KNOWN) // 2]] = np.nan
    found = mutual_information_gap(of(KNOWN, (Factor("shape", unknown, 3), CLASSES[1])))
    assert found.beside["samples"] == len(KNOWN) // 2
    assert found.estimate.value == pytest.approx(1, abs=0.03)
    with pytest.raises(UserError, match=r"factors = colur: .*did you mean 'colour'|factors = colur"):
        mutual_information_gap(IDENTITY, factors="shape,colur")
    with pytest.raises(UserError, match="2 or more are needed"):
        dci(IDENTITY, factors="shape")
    with pytest.raises(UserError, match="the same for all samples"):
        mutual_information_gap(of(KNOWN, (Factor("constant", 0 * KNOWN[:, 0], 1),)))
    with pytest.raises(UserError, match="samples have all of them"):
        modularity(first(30, IDENTITY))
    with pytest.raises(UserError, match="at most 256"):
        dci(of(RNG.standard_normal((len(KNOWN), 300))))
    with pytest.raises(UserError, match="encodes nothing"):
        factor_vae_score(of(0 * KNOWN))
