"""A grid optimised for a model: stored beside it, found by its name, and drawn on as the levels that it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from scoreray.cluster.verbs.grid import GridResult, optimise_to
from scoreray.data.errors import DataError, UserError
from scoreray.data.storage.store import open_store
from scoreray.sampling.grids.stored import StoredGrid, read_grids
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.metrics.record import SamplingSettings
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, RequestError, generate
from scoreray.sampling.offline.job import begin
from scoreray.sampling.offline.optimise_grid import check_grid_request
from scoreray.sampling.offline.place import place_of
from scoreray.sampling.offline.record import SampleRecord
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.models import look_up
from scoreray.trainer.objectives.base import BaseObjective, Map


@pytest.fixture(scope="module")
def made(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> GridResult:
    url = new_run(str(tmp_path_factory.mktemp("grids") / "run"), shape=(2,), seed=1)
    return optimise_to(url, None, Request(count=16, sampler="dpmpp_2m", steps=4, guidance=1.5, class_label=1), 30)


def drawn(url: str, request: Request) -> torch.Tensor:
    model = load(url)
    return torch.cat([samples for samples, _ in generate(model, request.fitted(model.info))])


def test_it_is_stored_beside_the_model_with_what_made_it(made: GridResult) -> None:
    store = open_store(made.url)
    stored = read_grids(store)
    assert stored == {made.out: made.grid}
    assert made.grid.key == "grids/dpmpp_2m-4.json"
    assert store.get("grids/dpmpp_2m-4.png").startswith(b"\x89PNG")
    info = describe(made.url).info
    assert (made.grid.checkpoint, made.grid.ema, made.grid.samples) == (info.url, "0.050", 16)
    assert made.grid.sha256 == describe(made.url).sha256
    assert made.grid.guidance["weight"] == 1.5
    assert made.grid.errors[made.grid.grid] == min(made.grid.errors.values())
    assert {"karras", "geometric", "linear", "interior"} < set(made.grid.errors)
    assert made.grid.errors["optimised"] < 0.9 * made.grid.errors["karras"]
    assert json.loads(json.dumps(made.answer()))["levels"] == made.grid.levels
    text = made.text()
    assert "held out: optimised" in text
    assert "--sampler dpmpp_2m --steps 4 --grid optimised" in text


def test_its_name_draws_on_its_levels_and_the_job_records_them(made: GridResult, tmp_path: Path) -> None:
    by_name = Request(count=3, sampler="dpmpp_2m", steps=4, grid="optimised")
    by_levels = Request(count=3, sampler="dpmpp_2m", grid=made.grid.levels)
    assert torch.equal(drawn(made.url, by_name), drawn(made.url, by_levels))
    alone = Request(count=1, grid="optimised").fitted(describe(made.url).info)  # the only one there is
    assert (alone.sampler, alone.steps, alone.grid) == ("dpmpp_2m", 4, tuple(made.grid.levels))
    job, _, _ = begin(place_of(str(tmp_path / "drawn.npz"), "auto"), made.url, None, by_name, precision="fp32",
                      compile_="off")  # fmt: skip
    fields = json.loads(job.to_json())["request"]
    assert fields["grid"] == made.grid.levels
    assert fields["grid_checkpoint"] == made.grid.checkpoint
    assert SampleRecord.from_json(job.to_json(), job.request.batch_size).job == job
    assert "grid_checkpoint" not in json.loads(begin(
        place_of(str(tmp_path / "other.npz"), "auto"), made.url, None, by_levels, precision="fp32", compile_="off"
    )[0].to_json())["request"]  # fmt: skip


def test_a_service_draws_on_it_without_reading_the_store(made: GridResult, monkeypatch: pytest.MonkeyPatch) -> None:
    served = look_up("m", made.url)
    monkeypatch.setattr("scoreray.sampling.model.describe.read_grids", None)
    body = SampleBody(sampler="dpmpp_2m", steps=4, grid="optimised")
    request = make_request(body, served, Limits(), "application/json", 0)
    assert request.sigmas == (*made.grid.levels, 0.0)
    assert (request.grid, request.grid_checkpoint) == (tuple(made.grid.levels), made.grid.checkpoint)
    page = served.page(Limits())
    assert "optimised" in page["grids"]
    assert page["optimised_grids"][0]["levels"] == made.grid.levels
    with pytest.raises(Refused, match="stored: dpmpp_2m-4") as refused:
        make_request(body.model_copy(update={"steps": 5}), served, Limits(), "application/json", 0)
    assert refused.value.field == "grid"


def test_another_checkpoint_and_an_export_are_drawn_on_it_too(
    made: GridResult, new_run: Callable[..., str], tmp_path: Path
) -> None:
    later = new_run(str(tmp_path / "run"), images=128, shape=(2,))
    store, out = open_store(later), open_store(str(tmp_path / "model"))
    store.put(made.grid.key, made.grid.to_json())
    request = Request(count=1, grid="optimised").fitted(describe(later).info)
    assert request.grid_checkpoint == made.grid.checkpoint != describe(later).info.url
    out.put("grids/old-3.json", b"of an earlier export")
    export(later, out.url())
    assert list(read_grids(out).values()) == [made.grid]
    assert Request(count=1, grid="optimised").fitted(describe(out.url()).info).grid == tuple(made.grid.levels)


def test_one_that_is_damaged_or_not_there_is_one_line(new_run: Callable[..., str], tmp_path: Path) -> None:
    url = new_run(str(tmp_path / "run"), shape=(2,))
    with pytest.raises(
        RequestError, match=r"none is stored for heun of 3 steps, stored: none; `scoreray grid"
    ) as error:
        Request(count=1, sampler="heun", steps=3, grid="optimised").fitted(describe(url).info)
    assert len(str(error.value).splitlines()) == 1
    open_store(url).put("grids/heun-3.json", b"{}")
    info = describe(url).info  # other grids are drawn on
    assert Request(count=1).fitted(info).grid == "karras"
    with pytest.raises(DataError, match=r"heun-3\.json: no optimised grid of this version"):
        Request(count=1, sampler="heun", steps=3, grid="optimised").fitted(info)
    settings = EvaluationSettings(url, "s3://none/none", sampler="heun", steps=3, grid="optimised")
    with pytest.raises(DataError, match="heun-3"):
        settings.request().fitted(info)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(count=16, sampler="edm_sde", steps=4), "adds noise"),
        (Request(count=16, sampler="ddim", steps=4, options={"eta": 0.5}), "ddim without eta"),
        (Request(count=16, sampler="rk45", steps=4), "chooses its steps as it goes"),
        (Request(count=16, sampler="euler", steps=1), "one step has no level to choose"),
        (Request(count=3, sampler="euler", steps=4), "at least 4, half of which"),
    ],
)
def test_what_no_grid_can_be_optimised_for_is_refused(made: GridResult, request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        optimise_to(made.url, None, request_, 10)
    assert len(str(error.value).splitlines()) == 1


def test_models_without_a_denoiser_are_refused(new_run: Callable[..., str], tmp_path: Path) -> None:
    sections = {"objective": {"kind": "contrastive", "chain": "gibbs"}}
    machine = new_run(str(tmp_path / "rbm"), shape=(1, 8, 8), classes=0, network={"kind": "rbm"}, sections=sections)
    with pytest.raises(UserError, match="knows no noise level"):
        optimise_to(machine, None, Request(count=16, steps=4), 10)


def test_a_stored_grid_reads_back_as_it_was_written(tmp_path: Path) -> None:
    grid = StoredGrid("own.code:mine", 2, [80.0, 0.1 + 0.2], "karras", {"karras": 1.0}, "s3://a", 5, "none", "0" * 64,
                      3, 16, {"order": 2}, {"weight": 2.0}, "cat", {"text": "a"})  # fmt: skip
    store = open_store(str(tmp_path))
    store.put(grid.key, grid.to_json())
    assert list(read_grids(store).values()) == [grid]
    store.put(grid.key, grid.to_json().replace(b"80.0", b"70.0"))
    assert "damaged" in str(read_grids(store)[store.url(grid.key)])


def test_the_record_of_an_evaluation_names_the_checkpoint_of_a_grid_that_has_one() -> None:
    """Without one the record, and the digest that names it, are those of before there were optimised grids."""
    plain = SamplingSettings(sampler="heun", steps=2, grid="karras", sigma_range=[0.1, 1.0], seed=0, guidance=1.0,
                             options={})  # fmt: skip
    assert "grid_checkpoint" not in plain.model_dump()
    there = plain.model_copy(update={"grid": [80.0, 1.0], "grid_checkpoint": "runs/a"})
    assert SamplingSettings.model_validate(there.model_dump()).grid_checkpoint == "runs/a"


def test_a_model_of_few_steps_has_no_trajectory_to_follow(made: GridResult) -> None:
    class EndsOfPaths(BaseObjective):
        kind: str = "a_consistency"
        map: ClassVar[Map] = "consistency"

    info = describe(made.url).info
    few = replace(info, config=info.config.model_copy(update={"objective": EndsOfPaths()}))
    with pytest.raises(UserError, match="learns where paths of the ODE end, no mean"):
        check_grid_request(Request(count=16, sampler="euler", steps=4), few)
