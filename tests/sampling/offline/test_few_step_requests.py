"""Which requests fit a model of few steps: its defaults, and what is refused before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.guidance.guidance import LearnedGuidance
from scoreray.sampling.guidance.steering import Guidance, Measurement
from scoreray.sampling.measures.features import ExtractorChoice
from scoreray.sampling.metrics.registry import METRICS
from scoreray.sampling.model.describe import Description, ModelInfo
from scoreray.sampling.offline.generate import Request, RequestError
from scoreray.sampling.offline.job import begin
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.draw import SampleAnswer
from scoreray.sampling.service.models import ServedModel, look_up
from scoreray.sampling.service.request import Completed
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.objectives.base import BaseObjective, Map
from scoreray.trainer.objectives.teacher import TeacherConfig

MAPS: tuple[Map, ...] = get_args(Map)
FITTING = {  # the rest is refused
    "none": set(SAMPLERS) - {"flow_map"},
    "consistency": {"consistency"},
    "flow_map": set(SAMPLERS),
    "progressive": {"euler", "ddim"},
}


@dataclass(frozen=True)
class Learned(BaseObjective):
    """Stands for an objective of any map."""

    kind: str = "any"
    teacher: TeacherConfig | None = None
    steps: int = 4
    grid: str = "interior"


def learned(map_: Map) -> BaseObjective:
    made: type[Learned] = type("Learned", (Learned,), {"map": map_, "__annotations__": {"map": ClassVar[Map]}})
    return made(kind=f"a_{map_}")


@pytest.fixture(scope="module")
def served(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return look_up("small", new_run(str(tmp_path_factory.mktemp("runs") / "small")))


@pytest.fixture(scope="module")
def infos(served: ServedModel) -> dict[Map, ModelInfo]:
    config = served.info.config
    return {one: replace(served.info, config=config.model_copy(update={"objective": learned(one)})) for one in MAPS}


@pytest.mark.parametrize(
    ("map_", "max_calls", "becomes"),
    [
        ("consistency", 1, ("consistency", 1, "interior")),
        ("consistency", 100, ("consistency", 4, "interior")),
        ("flow_map", 3, ("flow_map", 3, "interior")),
        ("flow_map", 7, ("flow_map", 4, "interior")),
        ("flow_map", 8, ("dpmpp_2m", 8, "interior")),
        ("flow_map", 30, ("unipc", 30, "interior")),
        ("progressive", 4, ("euler", 4, "interior")),
        ("progressive", 100, ("euler", 4, "interior")),
    ],
)
def test_a_budget_of_calls_is_spent_on_the_models_own_sampler_for_a_few_steps(
    infos: dict[Map, ModelInfo], map_: Map, max_calls: int, becomes: tuple[str, int, str]
) -> None:
    request = Request(1, max_calls=max_calls).fitted(infos[map_])
    assert (request.sampler, request.steps, request.grid) == becomes
    assert request.calls(infos[map_]) <= max_calls


def test_a_budget_below_the_steps_that_a_model_was_distilled_to_is_refused(infos: dict[Map, ModelInfo]) -> None:
    with pytest.raises(
        RequestError, match="takes 4 calls a sample; the model was distilled to these, so give max_calls = 4"
    ):
        Request(1, max_calls=3).fitted(infos["progressive"])
    with pytest.raises(RequestError, match=r"sampler 'heun' needs E\[x_0 \| x\]"):
        Request(1, "heun", max_calls=3).fitted(infos["consistency"])


def test_an_optimised_grid_of_a_consistency_model_is_refused_without_naming_a_command_that_is_refused_too(
    infos: dict[Map, ModelInfo],
) -> None:
    with pytest.raises(UserError, match="so none can be made; leave the grid out"):
        infos["consistency"].optimised_grid(None, None)


def test_the_models_page_has_its_map_its_calls_and_no_sampler_that_is_wrong(
    served: ServedModel, infos: dict[Map, ModelInfo]
) -> None:
    page = replace(served, info=infos["consistency"]).page(Limits())
    assert page["map"] == "consistency"
    assert page["defaults"] == {"sampler": "consistency", "steps": 2, "grid": "interior", "calls": 2}
    assert list(page["samplers"]) == ["consistency"]


@pytest.mark.parametrize(
    ("map_", "defaults", "options"),
    [
        ("none", ("heun", 18, "karras"), {}),
        ("consistency", ("consistency", 2, "interior"), {}),
        ("flow_map", ("flow_map", 2, "interior"), {}),
        ("progressive", ("euler", 4, "interior"), {}),
    ],
)
def test_a_request_that_names_nothing_takes_the_models_own_sampler(
    infos: dict[Map, ModelInfo], map_: Map, defaults: tuple[str, int, str], options: dict[str, Any]
) -> None:
    request = Request(1).fitted(infos[map_])
    assert (request.sampler, request.steps, request.grid, request.options) == (*defaults, options)
    assert request.fitted(infos[map_]) == request


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("map_", MAPS)
def test_every_sampler_fits_a_model_or_is_refused_in_one_line(
    infos: dict[Map, ModelInfo], served: ServedModel, map_: Map, sampler: str
) -> None:
    """In a request, which the command line, `evaluate` and sweeps make of their words, and over HTTP."""
    info = infos[map_]
    there = replace(served, info=info)
    assert (sampler in there.page(Limits())["samplers"]) == (sampler in FITTING[map_])
    if sampler in FITTING[map_]:
        assert Request(1, sampler).fitted(info).sampler == sampler
        return
    with pytest.raises(RequestError) as caught:
        Request(1, sampler).fitted(info)
    with pytest.raises(Refused) as refused:
        make_request(SampleBody(sampler=sampler), there, Limits(), "application/json", 0)
    assert caught.value.field == refused.value.field == "sampler"
    assert f"sampler '{sampler}'" in str(caught.value) == refused.value.message
    assert "\n" not in str(caught.value)


def test_a_flow_map_is_asked_for_the_end_by_consistency_and_for_the_mean_by_every_other_sampler(
    infos: dict[Map, ModelInfo],
) -> None:
    own, plain = (Request(1, name).fitted(infos["flow_map"]) for name in ("consistency", "heun"))
    assert (own.steps, own.grid, own.options) == (2, "interior", {"target": True})
    assert (plain.steps, plain.grid, plain.options) == (18, "karras", {})
    assert Request(1, "consistency").fitted(infos["none"]).options == {}
    assert Request(1, "flow_map", grid="80,0.8").fitted(infos["flow_map"]).steps == 2


def test_what_is_refused_is_refused_before_weights_are_read(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Description, "weights", lambda self: pytest.fail("the weights were read"))
    place = place_of(str(tmp_path / "samples.npz"), "npz")
    with pytest.raises(RequestError, match="sampler 'flow_map' needs a network that takes the level to reach"):
        begin(place, served.url, None, Request(1, "flow_map"))
    assert not list(tmp_path.iterdir())


MEASURED = Measurement("gray", "absent.png")


@pytest.mark.parametrize(
    ("map_", "words", "field", "message"),
    [
        ("progressive", {"steps": 5}, "steps", "steps = 5: objective.kind 'a_progressive' learns the steps of its own"),
        ("progressive", {"grid": "karras"}, "grid", "grid = karras: .* leave grid out"),
        ("progressive", {"sampler": "ddim", "options": {"eta": 0.5}}, "sampler", "sampler 'ddim'.*choose euler"),
        ("consistency", {"sampler": "consistency", "options": {"target": True}}, "options", "target = true needs"),
        ("consistency", {"guidance": 2.0}, "guidance", "or train with objective.teacher.guidance"),
        ("consistency", {"guidance": Guidance(2.0, ema="0.1")}, "guidance", "guidance adds up means"),
        ("progressive", {"guidance": 2.0}, "guidance", "guidance adds up means"),
        ("flow_map", {"guidance": 2.0}, "guidance", "guidance adds up means"),
        ("consistency", {"measurement": MEASURED}, "sampler", "--inpaint and --inverse correct means"),
        ("flow_map", {"measurement": MEASURED}, "sampler", "choose --sampler heun"),
    ],
)
def test_what_needs_the_mean_is_refused_of_a_map(
    infos: dict[Map, ModelInfo], map_: Map, words: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        Request(1, **words).fitted(infos[map_])
    assert caught.value.field == field


def test_of_a_flow_map_guidance_and_measurements_are_taken_by_samplers_of_the_mean(infos: dict[Map, ModelInfo]) -> None:
    Request(1, "heun", guidance=2.0).fitted(infos["flow_map"])
    Request(1, "heun", measurement=MEASURED).fitted(infos["flow_map"])


def guided(info: ModelInfo) -> ModelInfo:
    objective = replace(cast(Any, info.config.objective), teacher=TeacherConfig("absent", guidance=(1.5, 4.0)))
    return replace(info, config=info.config.model_copy(update={"objective": objective}))


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (Guidance(2.0, ema="0.1"), "guidance is one weight, an input"),
        (Guidance(2.0, negative="a"), "guidance is one weight, an input"),
        (Guidance(weights={"label": 2.0}), "guidance is one weight, an input"),
        (Guidance(2.0, interval=(1.0, 2.0)), "guidance is one weight, an input"),
        (9.0, "guidance = 9: this model learned weights from 1.5 to 4"),
    ],
)
def test_a_weight_that_is_an_input_is_one_of_those_learned(
    infos: dict[Map, ModelInfo], guidance: float | Guidance, message: str
) -> None:
    info = guided(infos["consistency"])
    assert Request(1, guidance=2.0).fitted(info).guided.weight == 2
    with pytest.raises(RequestError, match=message) as caught:
        Request(1, guidance=guidance).fitted(info)
    assert caught.value.field == "guidance"


@pytest.mark.parametrize(("weight", "expected"), [(2.5, 2.5), (1.0, 1.5)])
def test_guidance_that_was_learned_is_an_input_of_every_call_and_costs_no_row(
    infos: dict[Map, ModelInfo], served: ServedModel, weight: float, expected: float
) -> None:
    """Over HTTP and in the step batcher, and offline."""
    seen: list[Condition] = []

    def denoiser(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        seen.append(condition)
        return x / 2

    there = replace(served, info=guided(infos["consistency"]))
    request = make_request(SampleBody(count=3, guidance=weight), there, Limits(), "application/json", 0)
    batcher = StepBatcher(denoiser, 8)
    batcher.submit(request)
    while batcher.step():
        pass
    LearnedGuidance(denoiser, expected)(torch.ones(3, 1, 8, 8), torch.ones(3), Condition({"label": torch.arange(3)}))
    assert sum(len(one) for one in seen[:-1]) == 3 * request.expected_calls == 6
    for one in seen:
        assert one.values["guidance_weight"].tolist() == [[expected]] * len(one)
        assert "label" in one.values
    about = SampleAnswer.of(request, Completed(b"[]", "fp32", 0.0, 0.0)).about
    assert (about["guidance"], about["conditions"]) == (weight, ["label"])
    refused = SampleBody(count=3, guidance=2.0, negative_prompt=served.info.classes[0])
    with pytest.raises(Refused, match="a negative prompt needs guidance of several calls"):
        make_request(refused, there, Limits(), "application/json", 0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of grey 8 x 8 pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    np.savez(folder / "pictures.npz", images=np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1))
    return pack(str(folder / "pictures.npz"), str(folder / "packed"))


NEED_THE_MEAN = {"bpd", "nats", "loss", "elbo", "fisher", "calibration", "ood", "mse", "psnr", "ssim"}


@pytest.mark.parametrize("map_", ["consistency", "progressive"])
def test_metrics_of_the_mean_do_not_fit_a_map(infos: dict[Map, ModelInfo], map_: Map, manifest: Manifest) -> None:
    unfit = {
        name: METRICS[name].unfit(infos[map_], manifest, ExtractorChoice("identity")) or "" for name in NEED_THE_MEAN
    }
    assert all(infos[map_].instead_of_mean in why for why in unfit.values()), unfit
    for name in ("fid", "kid", "sw", "mmd"):
        assert METRICS[name].unfit(infos[map_], manifest, ExtractorChoice("identity")) is None
    assert METRICS["nats"].unfit(infos["flow_map"], manifest, ExtractorChoice("identity")) is None
    assert METRICS["psnr"].unfit(infos["flow_map"], manifest, ExtractorChoice("identity")) is not None
