"""Samples under conditions of every kind: closed forms of ensembles, batches, words of a command line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.sampling.guidance.inverse import LinearInverse
from scoreray.sampling.guidance.operators import mask
from scoreray.sampling.guidance.steering import Guidance, parse_guidance, untrained_estimate
from scoreray.sampling.measures.likelihood import log_likelihood
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.offline.conditions import parse_conditions, read_condition, sha256_of
from scoreray.sampling.offline.driver import Form, in_form
from scoreray.sampling.offline.ensembles import ConditionsFrom
from scoreray.sampling.offline.generate import Request, SampleConditions, generate, prepare
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec
from scoreray.trainer.diffusion.condition_shapes import check_condition, example_condition

STD, SIGMA_DATA = 0.3, 0.5
SPECS: Conditions = {
    "label": ConditionSpec("class", classes=("cat", "dog", "3")),
    "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (1.0, 0.0), (2.0, 1.0))),
    "coarse": ConditionSpec("concat", (1, 2, 2)),
    "tokens": ConditionSpec("sequence", (4, 2)),
    "caption": ConditionSpec("text", (6,)),
}
# Of the mean that the words below give: dog adds 1, place (0.5, -1) its first number, tokens the mean of their numbers.
WORDS = {"label": "dog", "place": "2,-1", "tokens": "[[1, 2], [3, 4]]", "caption": "abc"}
MEAN = 1 + 0.5 + 2.5 + 3


class Linear(nn.Module):
    """Data N(m, STD^2) whose mean is linear in the conditions: the exact denoiser, written as a network of it. What is
    null adds nothing to m."""

    conditions = SPECS

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def mean(self, condition: Condition | None, rows: int) -> Tensor:
        total = torch.zeros(rows)
        if condition is None:
            return total
        for name, value in condition.values.items():
            mask = condition.mask(name).float()
            if name == "label":
                total = total + value.clamp(min=0) * mask
            elif name == "caption":
                total = total + mask.sum(1)
            elif name == "tokens":
                total = total + (value.mean(2) * mask).sum(1) / mask.sum(1).clamp(min=1)
            else:
                total = total + value.flatten(1)[:, 0] * mask
        return total

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
        sigma = (4 * c_noise).exp()
        x = x * (sigma**2 + SIGMA_DATA**2).sqrt()[:, None]
        mean = self.mean(condition, len(x))[:, None]
        return mean + (x - mean) * (STD**2 / (STD**2 + sigma**2))[:, None]


@pytest.fixture(scope="module")
def model(mlp_config: Config) -> LoadedDenoiser:
    found = LoadedDenoiser(Linear(), "denoised", SIGMA_DATA).eval()
    found.info = ModelInfo("none", 0, "none", (2,), SPECS["label"].classes, mlp_config, SPECS)
    return found


def drawn(model: LoadedDenoiser, request: Request) -> Tensor:
    return torch.cat([x for x, _ in generate(model, request)])


def test_an_ensembles_moments_are_those_of_the_closed_form_for_every_kind_of_condition(model: LoadedDenoiser) -> None:
    count = 3000
    for words in [*({name: word} for name, word in WORDS.items()), WORDS]:
        x = drawn(model, Request(count, "heun", 24, conditions=words, batch_size=count))
        expected = model.network.mean(read_condition(words, model.info), 1)
        std = STD / math.sqrt(2 * count)
        assert (x.mean(0) - expected).abs().max() < 4 * STD / math.sqrt(count) + expected.abs() * STD / 80
        assert (torch.cov(x.T) - STD**2 * torch.eye(2)).abs().max() < 0.05 * STD + 4 * STD * std
    assert float(expected) == pytest.approx(MEAN)


def test_guidance_of_a_linear_model_moves_the_mean_by_each_conditions_own_weight(model: LoadedDenoiser) -> None:
    conditions = {"caption": "abc", "label": "dog"}
    for guidance, mean in [
        (Guidance(2.0), 2 * 4.0),
        (Guidance(weights={"caption": 3.0}), 3 * 3 + 1.0),
        (Guidance(2.0, weights={"caption": 3.0}), 3 * 3 + 2 * 1.0),
        (Guidance(weights={"label": 0.0}), 3.0),
    ]:
        x = drawn(model, Request(512, "heun", 24, conditions=conditions, guidance=guidance, batch_size=512))
        assert float(x.mean()) == pytest.approx(mean, abs=0.1)


def test_a_null_condition_is_an_unconditional_network_and_batches_change_no_bit(model: LoadedDenoiser) -> None:
    driven = in_form(model, Form(rows=16))
    seeds = torch.arange(37)
    draw = prepare(driven, Request(37, "edm_sde", 5))
    null = Condition(
        {"caption": torch.zeros(37, 2, dtype=torch.uint8)}, {"caption": torch.zeros(37, 2, dtype=torch.bool)}
    )
    assert torch.equal(draw(seeds, null), draw(seeds, None))
    texts = [read_condition({"caption": "abcdef"[: 1 + i % 6]}, model.info) for i in range(37)]
    together = draw(seeds, Condition.cat(texts, [1] * 37))
    alone = [draw(seeds[i : i + 1], texts[i]) for i in (0, 5, 36)]
    assert torch.equal(together[[0, 5, 36]], torch.cat(alone))


def test_a_network_of_every_kind_of_condition_gives_a_row_the_same_bits_in_any_batch(
    new_run: Callable[..., str], tmp_path: Path
) -> None:
    """Whichever rows share its call, and however long their conditions are; what is null is as if it were not given."""
    specs = {**SPECS, "coarse": ConditionSpec("concat", (2, 4, 4))}
    network = load(new_run(str(tmp_path / "run"), shape=(3, 8, 8), classes=["a"], conditions=specs), device="cpu")
    draw = prepare(
        in_form(network, Form(rows=16)), Request(21, "edm_sde", 3, guidance=Guidance(weights={"caption": 2.0}))
    )
    seeds, given = torch.arange(21), example_condition(specs, 21)
    assert given is not None
    together = draw(seeds, given)
    short = given[9:11]
    lengths = {name: int(short.masks[name].sum(1).max()) for name in ("caption", "tokens")}
    for name, length in lengths.items():
        assert length < specs[name].shape[0]
    cut = Condition(
        {name: value[:, : lengths[name]] if name in lengths else value for name, value in short.values.items()},
        {name: mask[:, : lengths[name]] if name in lengths else mask for name, mask in short.masks.items()},
    )
    assert torch.equal(draw(seeds[9:11], cut), together[9:11])
    free = prepare(in_form(network, Form(rows=16)), Request(21, "heun", 3))
    assert torch.equal(free(seeds[:3], given.null()[:3]), free(seeds[:3], None))
    assert not torch.equal(free(seeds[:3], given[:3]), free(seeds[:3], None))


def test_texts_are_read_once_for_all_steps_to_the_same_bits(new_run: Callable[..., str], tmp_path: Path) -> None:
    """By whatever draws: the model itself, guided, in rows, or guided by another model, which reads texts at each call
    as each model reads in its own way."""
    specs = {"label": SPECS["label"], "caption": SPECS["caption"]}
    run = new_run(str(tmp_path / "run"), shape=(3, 8, 8), classes=["a"], conditions=specs)
    network, given, calls = load(run, device="cpu"), example_condition(specs, 21), list[int]()
    reader = network.network.embedding.inputs["text_caption"].read
    reader.register_forward_hook(lambda *call: calls.append(len(call[-1])))
    apart = Guidance(weights={"caption": 2.0})
    for guidance, expected in ((Guidance(), [16, 16]), (apart, [16, 16]), (Guidance(2.0, ema="0.1"), [16] * 2 * 5)):
        model = in_form(network, Form(rows=16))
        request = Request(21, "heun", 3, guidance=guidance)
        calls.clear()
        once = prepare(model, request)(torch.arange(21), given)
        assert calls == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[sample.__module__], "encoded", lambda denoiser, condition: condition)
            assert torch.equal(prepare(model, request)(torch.arange(21), given), once)


def test_guidance_is_warned_of_estimates_that_the_run_never_learned(model: LoadedDenoiser) -> None:
    def warning(guidance: Guidance, together: float, **alone: float) -> str | None:
        settings = model.info.config.model_dump(mode="json")
        settings["objective"]["label_dropout"] = together
        settings["data"]["conditions"] = {name: {"dropout": alone.get(name, 0.0)} for name in specs}
        return untrained_estimate(replace(model.info, config=load_config(settings), conditions=specs), given, guidance)

    specs, given = {name: SPECS[name] for name in ("label", "caption")}, ("label", "caption")
    both, caption = Guidance(2.0), Guidance(1.0, weights={"caption": 3.0})
    assert warning(Guidance(), 0.0) is None
    assert warning(both, 0.1) is None
    assert warning(both, 0.0, label=0.1, caption=0.1) is None, "by chance both at once"
    assert "without label, caption, which this run never met (objective.label_dropout is 0)" in str(warning(both, 0.0))
    assert "without caption beside label, which this run never met (data.conditions.caption.dropout is 0)" in str(
        warning(caption, 0.1, label=0.1)
    )
    assert warning(caption, 0.0, caption=0.1) is None
    # The greatest weight enters last, so it is what estimates are made without; the other one only with it.
    apart = Guidance(1.0, weights={"label": 2.0, "caption": 3.0})
    assert warning(apart, 0.1, caption=0.1) is None
    assert "without caption beside label" in str(warning(apart, 0.1, label=0.1))
    given = ("caption",)
    assert "without label beside caption" in str(warning(both, 0.1)), "what is not given is null as well"


def test_likelihood_and_inpainting_are_those_given_the_condition(model: LoadedDenoiser) -> None:
    given = read_condition(WORDS, model.info)
    assert given is not None
    settings: dict[str, Any] = {"sigma_min": 0.01, "sigma_max": 20.0, "trace": "exact", "rtol": 1e-4, "data_std": STD}
    variance = STD**2 + 0.01**2
    for condition, mean in ((given.expand(4), MEAN), (given.expand(4).null(), 0.0), (None, 0.0)):
        x = mean + STD * SampleNoise(range(4)).normal((4, 2))
        found = log_likelihood(model, x, condition=condition, data_mean=mean, **settings)
        exact = -((x - mean) ** 2).sum(1) / (2 * variance) - math.log(2 * math.pi * variance)
        torch.testing.assert_close(found.nats, exact, rtol=0, atol=0.02)
        bits = 7 - exact / (2 * math.log(2))  # a dimension, of levels 2 / 256 wide
        torch.testing.assert_close(found.bits_per_dim(), bits, rtol=0, atol=0.02)
    observed = LinearInverse(model, mask(torch.tensor([True, False])), torch.tensor([2.0, 0.0]), data_std=STD)
    start = 80 * SampleNoise(range(500)).normal((500, 2))
    drawn = sample(observed, start, model.info.sigmas(24), condition=given.expand(500))
    torch.testing.assert_close(drawn[:, 0], torch.full((500,), 2.0))
    assert float(drawn[:, 1].mean()) == pytest.approx(MEAN, abs=0.1)


def test_words_become_one_condition_of_all_samples(model: LoadedDenoiser, tmp_path: Path) -> None:
    field = tmp_path / "field.npy"
    np.save(field, np.arange(12, dtype=np.float32).reshape(3, 4))
    found = read_condition({**WORDS, "coarse": str(field)}, model.info)
    assert found is not None
    check_condition(found, SPECS, 1)
    assert found.values["place"].tolist() == [[0.5, -1.0]]
    assert found.values["coarse"].shape == (1, 1, 2, 2)  # the grid of the network
    assert bytes(found.values["caption"][0].tolist()) == b"abc"
    Image.fromarray(np.full((5, 7), 9, np.uint8)).save(tmp_path / "field.png")
    picture = read_condition({"coarse": str(tmp_path / "field.png")}, model.info)
    assert picture is not None
    assert picture.values["coarse"].shape == (1, 1, 2, 2)
    np.save(tmp_path / "none.npy", np.zeros((0, 2), np.float32))
    for word in ("", "[]", str(tmp_path / "none.npy")):
        empty = read_condition({"tokens": word}, model.info)
        assert empty is not None
        assert not bool(empty.mask("tokens").any()), "a sequence without a token is the null"
    before = sha256_of(found)
    np.save(field, np.ones((3, 4), np.float32))
    assert sha256_of(read_condition({**WORDS, "coarse": str(field)}, model.info)) != before


def test_classes_are_in_turn_only_where_nothing_else_is_given(model: LoadedDenoiser) -> None:
    def labels(**fields: Any) -> list[int]:
        found = SampleConditions(Request(5, **fields), model.info).of(0, 5)
        assert found is not None
        return found.values["label"].tolist()

    assert labels() == [0, 1, 2, 0, 1]
    assert labels(conditions={"caption": "a"}) == [-1] * 5
    assert labels(conditions={"caption": "a"}, class_label="dog") == [1] * 5
    assert labels(conditions={"label": "index:2"}) == [2] * 5


def test_a_number_far_from_the_data_is_a_warning(model: LoadedDenoiser) -> None:
    def warnings(word: str) -> list[str]:
        return SampleConditions(Request(1, conditions={"place": word}), info).warnings

    info = model.info  # place has mean (1, 0) and std (2, 1)
    assert warnings("20.9,-9.9") == []
    assert warnings("1,99999") == [
        "condition 'place': 99999 is far from the data (within 10 standard deviations they are -10 to 10): samples may "
        "be arbitrary"
    ]
    hours = replace(SPECS["place"], normaliser=Normaliser("range", (11.5, 0.0), (11.5, 1.0)))
    info = replace(info, conditions={**SPECS, "place": hours})
    assert warnings("0,1") == warnings("23,-1") == []
    assert "24 is far from the data (their range is 0 to 23)" in warnings("24,0")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"captoin": "a"}, "--condition 'captoin': this network was not built for it; it takes label, place, coarse, "),
        ({"caption": "abcdefg"}, "--condition 'caption': a text of 7 bytes .UTF-8., this model takes at most 6"),
        ({"label": "bird"}, "--condition 'label': class 'bird' is unknown"),
        ({"place": "1"}, r"--condition 'place': numbers of shape \[1\], this model takes 2 numbers"),
        ({"place": "north,2"}, "--condition 'place': 'north,2', this model takes 2 numbers; write a number, numbers"),
        ({"place": "2020-01-01"}, "--condition 'place': '2020-01-01', this model takes 2 numbers"),
        ({"coarse": "note.txt"}, "'note.txt', this model takes numbers of shape .* or a file: npy, npz or a picture"),
        ({"tokens": "[[1,2],[3]]"}, "--condition 'tokens': '..1,2.,.3..': lists of unequal lengths; give"),
        ({"place": "1,nan"}, "--condition 'place': nan at index .1.; give finite numbers"),
        ({"place": "-Inf,1"}, "--condition 'place': -inf at index .0.; give finite numbers"),
        ({"place": ".nan,2"}, "--condition 'place': nan at index .0.; give finite numbers"),
        ({"place": ""}, "--condition 'place': '', this model takes 2 numbers; write a number, numbers with commas"),
        ({"coarse": "gone.npy"}, "gone.npy: no such file"),
        ({"tokens": "[[1,2],[1,2],[1,2],[1,2],[1,2]]"}, "--condition 'tokens': 5 tokens, this model takes at most 4"),
    ],
)  # fmt: skip
def test_a_condition_that_does_not_fit_is_one_line(words: dict[str, str], message: str, model: LoadedDenoiser) -> None:
    with pytest.raises(UserError, match=message) as error:
        SampleConditions(Request(1, conditions=words), model.info)
    assert "\n" not in str(error.value)


def test_words_that_mean_nothing_are_refused_before_a_model_is_read(model: LoadedDenoiser) -> None:
    with pytest.raises(UserError, match='--condition caption: write NAME=VALUE, such as caption="a red circle"'):
        parse_conditions(["caption"])
    with pytest.raises(UserError, match="--condition a: is given twice"):
        parse_conditions(["a=1", "a=2"])
    assert parse_conditions(["caption=a=b"]) == {"caption": "a=b"}
    assert parse_guidance(["3", "label=2"]) == (3.0, {"label": 2.0})
    with pytest.raises(UserError, match="--guidance high: write a weight"):
        parse_guidance(["high"])
    two = replace(model.info, conditions={**SPECS, "kind": SPECS["label"]}, classes=())
    with pytest.raises(UserError, match="--class-label: this model's classes are label, kind; give --condition NAME="):
        SampleConditions(Request(1, class_label="dog"), two)
    unconditional = replace(model.info, conditions={}, classes=())
    with pytest.raises(UserError, match="--condition caption: this model takes no conditions"):
        SampleConditions(Request(1, conditions={"caption": "a"}), unconditional)
    records = ConditionsFrom("nowhere", 1, 1, "")
    with pytest.raises(UserError, match="--conditions-from nowhere: this model takes no conditions; leave it out"):
        SampleConditions(Request(1, conditions_from=records), unconditional)
    with pytest.raises(UserError, match="--class-label and --condition label: leave one of them out"):
        SampleConditions(Request(1, conditions={"label": "dog"}, class_label="dog"), model.info)
    weights = Guidance(weights={"place": 2.0})
    with pytest.raises(UserError, match="guidance place=2: no condition 'place' is given"):
        SampleConditions(Request(1, conditions={"caption": "a"}, guidance=weights), model.info)
