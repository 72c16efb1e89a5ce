"""Requests with a budget of network calls: what they become on a model, and which do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from scoreray.cluster.cli import main as cli
from scoreray.data.errors import UserError
from scoreray.sampling.grids.stored import StoredGrid
from scoreray.sampling.model.describe import ModelInfo, describe
from scoreray.sampling.offline.generate import Request, RequestError
from scoreray.sampling.samplers.sample import ADAPTIVE, SAMPLERS


@pytest.fixture(scope="module")
def info(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return describe(new_run(str(tmp_path_factory.mktemp("runs") / "small"))).info


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ({"max_calls": 1}, ("dpmpp_2m", 1, "interior")),
        ({"max_calls": 12}, ("dpmpp_2m", 12, "interior")),
        ({"max_calls": 13}, ("unipc", 13, "interior")),
        ({"max_calls": 5000}, ("unipc", 40, "interior")),
        ({"max_calls": 36, "sampler": "heun"}, ("heun", 18, "karras")),
        ({"max_calls": 200, "sampler": "euler"}, ("euler", 200, "karras")),
        ({"max_calls": 9, "steps": 4, "grid": "geometric"}, ("dpmpp_2m", 4, "geometric")),
        ({"max_calls": 9, "grid": (80, 5, 0.5)}, ("dpmpp_2m", 3, (80.0, 5.0, 0.5))),
        ({"max_calls": 50, "sampler": "ncsnv2", "steps": 9}, ("ncsnv2", 9, "geometric")),
    ],
)
def test_a_budget_becomes_sampler_steps_and_grid(info: ModelInfo, given: dict[str, Any], becomes: tuple[Any, ...]):
    request = Request(1, **given).fitted(info)
    assert (request.sampler, request.steps, request.grid) == becomes
    assert request.max_calls is None, "it is spent: the record of a job is that of the same words without it"
    assert request.calls(info) <= given["max_calls"]


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        (
            {"max_calls": 10, "sampler": "heun", "steps": 18},
            "max_calls",
            "takes 35 calls a sample; give at most 5 steps",
        ),
        ({"max_calls": 10, "steps": 18}, "max_calls", "at most 10 steps, or leave steps out"),
        (
            {"max_calls": 2, "grid": (80, 5, 0.5)},
            "max_calls",
            "takes 3 calls a sample; give at most 2 noise levels",
        ),
        ({"max_calls": 50, "sampler": "rk45"}, "sampler", "chooses its steps as it goes"),
        ({"max_calls": 50, "sampler": "ncsnv2"}, "max_calls", "with 42 steps takes 211 calls a sample; give at most 9"),
        ({"max_calls": 3, "sampler": "langevin", "options": {"num_steps": 50}}, "max_calls", "choose another sampler"),
        ({"max_calls": 0}, "max_calls", "must be 1 to 10,000"),
        ({"max_calls": 20_000}, "max_calls", "must be 1 to 10,000"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    info: ModelInfo, given: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        Request(1, **given).fitted(info)
    assert refused.value.field == field


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - ADAPTIVE - {"ncsn", "ncsnv2", "flow_map"}))
def test_every_sampler_fits_its_steps_to_a_budget(info: ModelInfo, sampler: str) -> None:
    request = Request(1, sampler, max_calls=60).fitted(info)
    assert request.steps is not None
    more = Request(1, sampler, steps=request.steps + 1).fitted(info)
    assert request.calls(info) <= 60 < more.calls(info)


def test_a_grid_that_is_stored_for_the_sampler_and_steps_is_taken(info: ModelInfo) -> None:
    levels = [80.0, 9.0, 2.0, 0.5]
    stored = StoredGrid("dpmpp_2m", 4, levels, "optimised", {}, "s3://runs/r", 5, "0.050", "0" * 64, 0, 256)
    optimised = replace(info, grids={"s3://runs/r/grids/dpmpp_2m-4.json": stored})
    for given in ({}, {"sampler": "dpmpp_2m"}, {"steps": 4}, {"grid": "optimised"}):
        request = Request(1, max_calls=4, **given).fitted(optimised)
        assert (request.sampler, request.grid, request.calls(info)) == ("dpmpp_2m", tuple(levels), 4)
    assert Request(1, max_calls=9, grid="optimised").fitted(optimised).steps == 4
    for given in ({"max_calls": 5}, {"max_calls": 4, "grid": "karras"}, {"max_calls": 7, "sampler": "heun"}):
        assert Request(1, **given).fitted(optimised).grid == Request(1, **given).fitted(info).grid
    with pytest.raises(RequestError, match="takes 4 calls a sample; give at most 3 noise levels"):
        Request(1, max_calls=3, grid="optimised").fitted(optimised)


def test_a_model_that_is_drawn_by_gibbs_has_no_calls_to_limit(new_run: Callable[..., str], tmp_path: Any) -> None:
    sections = {"objective": {"kind": "contrastive", "chain": "gibbs"}}
    url = new_run(str(tmp_path / "rbm"), network={"kind": "rbm", "num_hidden": 4}, classes=0, sections=sections)
    with pytest.raises(UserError, match=r"--max-calls 9: is not for network.kind 'rbm'"):
        Request(1, max_calls=9).fitted(describe(url).info)


def test_the_command_draws_within_a_budget_and_says_what_a_sample_took(
    new_run: Callable[..., str], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url, out = new_run(str(tmp_path / "small")), tmp_path / "drawn"
    words = ["sample", url, "--count", "2", "--max-calls", "3", "--out", str(out)]
    cli.app(words, standalone_mode=False)
    assert ", 3 calls a sample): " in capsys.readouterr().out
    record = json.loads((out / "sampling.json").read_text())
    assert record["calls"] == 3
    assert [record["request"][name] for name in ("sampler", "steps", "grid")] == ["dpmpp_2m", 3, "interior"]
    assert "max_calls" not in record["request"]
    cli.app([*words, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["calls"] == 3, "also of samples that were there"
