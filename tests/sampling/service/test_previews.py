"""Previews of a stream: estimates of its first samples, at the level that the sheet says, from noise to image."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.sampling.service.models import look_up
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import Completed, Preview


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "shown"))


def previews(url: str, **fields: object) -> list[Preview]:
    async def main() -> list[Preview]:
        replica = Replica(ServeConfig((("small", url),), precision="fp32", compile="off"))
        body = SampleBody(stream=True, seed=1, **fields)
        try:
            request = make_request(body, look_up("small", url), Limits(), "application/json", 1)
            events = [event async for event in replica.draw(request)]
        finally:
            await replica.close()
        assert isinstance(events[-1], Completed)
        return [event for event in events if isinstance(event, Preview)]

    return asyncio.run(main())


CHURN: dict[str, object] = {"sampler": "edm_sde", "options": {"s_churn": 10.0}}


@pytest.mark.parametrize(
    ("count", "fields"),
    [(1, {}), (16, {}), (64, {}), pytest.param(256, {}, marks=pytest.mark.slow), (64, CHURN), (64, {"guidance": 2.0})],
    ids=str,
)
def test_sigma_falls_from_sheet_to_sheet_however_many_samples(
    run_url: str, count: int, fields: dict[str, object]
) -> None:
    """A request larger than a batch is drawn in parts: only the rows on the sheet count, not those drawn after them."""
    shown = previews(run_url, count=count, steps=18, previews=8, **fields)
    sigmas = [event.sigma for event in shown]
    assert 6 <= len(shown) <= 8
    assert all(a > b for a, b in itertools.pairwise(sigmas)), sigmas
    assert sigmas[0] > 1 > sigmas[-1], sigmas
    assert len({event.b64_json for event in shown}) == len(shown)
    progress = [event.progress for event in shown]
    assert progress == sorted(progress)
    assert all(abs(share - (i + 1) / 9) < 0.12 for i, share in enumerate(progress[-8:], 8 - len(shown))), progress


def test_more_previews_than_levels_are_one_a_level(run_url: str) -> None:
    sigmas = [event.sigma for event in previews(run_url, count=64, steps=5, previews=32)]
    assert len(sigmas) == len(set(sigmas)) == 5
    assert sigmas == sorted(sigmas, reverse=True)


def test_a_sampler_that_stays_at_a_level_is_shown_there_too(run_url: str) -> None:
    shown = previews(run_url, count=40, sampler="langevin", steps=60, previews=6)
    assert len(shown) == 6
    assert len({event.b64_json for event in shown}) == 6
