"""Guidance as arithmetic on denoisers, its rows counted; exact where Bayes' rule is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    Interval,
    LearnedGuidance,
    classifier_free_steps,
    guidance_terms,
    term_rows,
)
from scoreray.sampling.guidance.inverse import LinearInverse
from scoreray.sampling.guidance.operators import mask, matrix
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import drive, sample, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion.condition import Condition, class_condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.levels import GUIDANCE_WEIGHT, with_guidance_weight, with_levels
from scoreray.trainer.objectives.teacher import Teacher

MEANS = torch.tensor([-1.0, 2.0], dtype=torch.float64)
STD = 0.4
GRID = karras(24, 0.01, 20.0)
LABELS = torch.tensor([0, 1, 1, 0, 1])


class TwoClasses:
    """Data of class k is N(MEANS[k], STD^2) in one dimension, the classes equally likely; label -1 is their mixture."""

    def __init__(self):
        self.rows = 0

    def __call__(self, x, sigma, class_labels):
        self.rows += len(x)
        variance = (STD**2 + sigma**2)[:, None]
        each = MEANS + (x - MEANS) * STD**2 / variance
        posterior = (-((x - MEANS) ** 2) / (2 * variance)).softmax(1)
        chosen = each.gather(1, class_labels.clamp_min(0)[:, None])
        return torch.where(class_labels[:, None] >= 0, chosen, (posterior * each).sum(1, keepdim=True))


def points():
    return torch.tensor([[-3.0], [0.5], [0.1], [1.0], [4.0]], dtype=torch.float64)


def test_weight_1_is_the_conditional_weight_0_the_unconditional_and_neither_doubles_the_rows():
    sigma, null = torch.full((5,), 0.7, dtype=torch.float64), torch.full_like(LABELS, -1)
    for weight, labels in ((1.0, LABELS), (0.0, null)):
        network = TwoClasses()
        guided = ClassifierFree(network, weight)
        assert torch.equal(guided(points(), sigma, LABELS), TwoClasses()(points(), sigma, labels))
        assert network.rows == 5


def test_classifier_free_guidance_extrapolates_in_one_call_of_twice_the_rows():
    sigma = torch.full((5,), 0.7, dtype=torch.float64)
    network = TwoClasses()
    guided = ClassifierFree(network, 3.0)
    base = network(points(), sigma, torch.full_like(LABELS, -1))
    strong = network(points(), sigma, LABELS)
    network.rows = 0
    torch.testing.assert_close(guided(points(), sigma, LABELS), base + 3 * (strong - base))
    assert network.rows == 10


class OfGiven:
    """Each condition that is given adds a number of its own to x; two together another one: they are dependent."""

    rows = 0

    def __call__(self, x, sigma, condition):
        self.rows += len(x)
        given = {name: condition.mask(name).to(x.dtype)[:, None] for name in condition.values}
        return x + 2 * given["caption"] + 5 * given["label"] + 0.25 * given["caption"] * given["label"]


@pytest.mark.parametrize(
    ("weight", "weights", "expected", "rows"),
    [
        (1.0, {}, 7.25, 1),
        (0.0, {}, 0.0, 1),
        (3.0, {}, 3 * 7.25, 2),  # all together: plain guidance
        (1.0, {"caption": 7.0}, 5 + 7 * 2.25, 2),  # the label is always given
        (2.0, {"caption": 7.0}, 2 * 5 + 7 * 2.25, 3),
        (1.5, {"label": 7.0, "caption": 1.5}, 1.5 * 2 + 7 * 5.25, 3),
        (4.0, {"label": 0.0}, 4 * 2, 2),  # 0 leaves it out
        (1.0, {"label": 0.5}, 2 + 0.5 * 5.25, 2),
    ],
)
def test_each_condition_has_a_weight_of_its_own_and_equal_ones_share_a_row(weight, weights, expected, rows):
    network, x = OfGiven(), points()
    condition = Condition({"caption": torch.zeros(5, 3), "label": LABELS})
    denoised = ClassifierFree(network, weight, weights)(x, torch.ones(5), condition)
    torch.testing.assert_close(denoised, x + expected)
    assert network.rows == 5 * rows


def test_weights_of_conditions_that_are_not_given_are_refused_by_name():
    with pytest.raises(UserError, match=r"guidance captoin=2: no condition 'captoin' is given; did you mean 'caption'"):
        guidance_terms(1.0, ["caption", "label"], {"captoin": 2.0})


def test_a_classifiers_gradient_at_weight_1_is_bayes_rule():
    def log_probability(x, sigma, labels):
        logits = -((x - MEANS) ** 2) / (2 * (STD**2 + sigma**2)[:, None])
        return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]

    mixture = TwoClasses()
    guided = ClassifierGuidance(lambda x, s: mixture(x, s, torch.full((len(x),), -1)), log_probability, 1.0)
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(guided(points(), sigma, LABELS), TwoClasses()(points(), sigma, LABELS))


def test_guidance_above_1_takes_samples_away_from_the_other_class():
    noise = SampleNoise(range(2000))
    x = 20 * noise.normal((2000, 1), torch.float64)
    labels = torch.ones(2000, dtype=torch.int64)
    plain, guided = (sample(ClassifierFree(TwoClasses(), w), x, GRID, class_labels=labels) for w in (1.0, 3.0))
    # From N(0, 20^2), not from N(2, 20^2 + STD^2), the ODE ends STD / 20 of the mean short.
    assert plain.mean().item() == pytest.approx(2.0 * (1 - STD / 20), abs=5 * STD / math.sqrt(2000))
    assert guided.min() > plain.min()
    assert guided.mean() > plain.mean() + 0.01


def test_autoguidance_leads_away_from_the_weak_models_errors(make_gaussian):
    good, weak = make_gaussian(0.0, 0.5), make_gaussian(0.2, 0.6)
    sigma = torch.full((5,), 0.3, dtype=torch.float64)
    guided = Autoguidance(good, weak, 2.0)
    torch.testing.assert_close(guided(points(), sigma), 2 * good(points(), sigma) - weak(points(), sigma))
    assert torch.equal(Autoguidance(good, weak, 1.0)(points(), sigma), good(points(), sigma))


@pytest.mark.parametrize("name", ["heun", "ddpm", "rk45"])
def test_guided_steps_for_a_batcher_give_the_samples_of_the_guided_denoiser(name):
    x = 20 * SampleNoise(range(5)).normal((5, 1), torch.float64)
    offline = sample(ClassifierFree(TwoClasses(), 2.5), x, GRID, sampler=name, generator=range(5), class_labels=LABELS)
    terms = guidance_terms(2.5, ["label"])
    steps = classifier_free_steps(start(name, x, GRID, range(5)), terms)
    stepped, _ = drive(steps, lambda x, sigma: TwoClasses()(x, sigma, term_rows(LABELS, terms)))
    torch.testing.assert_close(stepped, offline)


def exact_class(x, sigma, labels):
    means = MEANS.to(x.dtype)
    logits = -((x - means) ** 2) / (2 * (STD**2 + sigma**2)[:, None])
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def pull(x, sigma, labels=None):
    """A denoiser in the dtype of x, which `TwoClasses` is not."""
    return x * (0.25 / (0.25 + sigma**2))[:, None] + (0 if labels is None else 0.1 * labels[:, None].to(x.dtype))


WRAPPERS = {
    "classifier-free": ClassifierFree(pull, 2.0),
    "autoguidance": Autoguidance(pull, lambda x, s, y: pull(x, 2 * s, y), 2.0),
    "classifier": ClassifierGuidance(pull, exact_class, 2.0),
    "interval": Interval(ClassifierFree(pull, 2.0), pull, 0.5, 2.0),
    "inverse": LinearInverse(pull, mask(torch.tensor([True])), torch.tensor([0.3], dtype=torch.float64), 0.2),
    "inverse by jacobian": LinearInverse(
        pull, matrix(torch.ones(1, 1, dtype=torch.float64)), torch.tensor([0.3]), 0.2, method="jacobian"
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_keeps_the_dtype_and_its_rows_do_not_know_of_each_other(name):
    guided = WRAPPERS[name]
    for dtype in (torch.float32, torch.float64):
        x, sigma = points().to(dtype), torch.tensor([0.1, 0.6, 1.0, 3.0, 10.0], dtype=dtype)
        together = guided(x, sigma, LABELS)
        assert together.dtype == dtype
        rows = [guided(x[i : i + 1], sigma[i : i + 1], LABELS[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(torch.cat(rows), together)


def test_guidance_without_labels_without_classes_or_without_a_number_is_refused():
    with pytest.raises(UserError, match="needs class_labels"):
        sample(ClassifierFree(TwoClasses(), 2.0), points(), GRID)
    network = torch.nn.Identity()
    network.num_classes = 0
    with pytest.raises(UserError, match="no classes"):
        ClassifierFree(Denoiser(network), 2.0)
    with pytest.raises(UserError, match="guidance weight nan"):
        ClassifierFree(TwoClasses(), math.nan)
    with pytest.raises(UserError, match=r"interval \[2, 1\]: must be 0 <= low < high"):
        Interval(TwoClasses(), TwoClasses(), 2.0, 1.0)


def test_a_weight_that_the_network_takes_costs_one_row_and_is_taught_by_guidance_outside():
    class Recorded(torch.nn.Module):
        conditions = with_levels(class_condition(["a", "b"]), [GUIDANCE_WEIGHT])

        def forward(self, x, c_noise, condition):
            self.seen = condition
            return x * condition.values["label"][:, None]

    network, labels, sigma = Recorded(), torch.tensor([0, 1, -1]), torch.tensor([0.5, 1.0, 2.0])
    denoiser, x = Denoiser(network), torch.randn(3, 2)
    LearnedGuidance(denoiser, 3.0)(x, sigma, Condition({"label": labels}))
    torch.testing.assert_close(network.seen.values[GUIDANCE_WEIGHT], torch.full((3, 1), 2 / math.pi * math.atan(2)))
    denoiser(x, sigma, labels)
    assert not network.seen.values[GUIDANCE_WEIGHT].any()  # without a weight the network has weight 1

    class Plain(torch.nn.Module):
        conditions = class_condition(["a", "b"])

        def forward(self, x, c_noise, condition):
            return x * (1 + condition.values["label"][:, None])

    plain = Denoiser(Plain())
    given = with_guidance_weight(Condition({"label": labels}), 3.0, x)
    outside = ClassifierFree(plain, 3.0)(x, sigma, Condition({"label": labels}))
    torch.testing.assert_close(Teacher(plain).denoise(x, sigma, given), outside)
