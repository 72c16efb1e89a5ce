"""Jobs in parallel in time: the same samples to the tolerance, a record that says so, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoreray.cluster.verbs.sample import sample_to
from scoreray.data.errors import UserError
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.offline.record import SampleRecord
from scoreray.sampling.samplers.parallel import FEW


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "small"))


def test_a_job_in_parallel_in_time_has_the_samples_to_the_tolerance_and_says_so(
    run_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(name: str, **given: Any) -> tuple[Any, dict[str, Any]]:
        request = Request(FEW + 1, sampler="euler", steps=18, **given)
        done = sample_to(str(tmp_path / f"{name}.npz"), run_url, None, request, precision="fp32", compile_="off")
        (record,) = tmp_path.glob(f"{name}*.json")
        data = record.read_bytes()
        assert SampleRecord.from_json(data, request.batch_size).job == done.job
        return np.load(tmp_path / f"{name}.npz")["images"].astype(float), json.loads(data)

    plain, before = drawn("plain")
    assert "--parallel" not in capsys.readouterr().err
    parallel, after = drawn("parallel", parallel=True)
    assert f"--parallel: of no use for {FEW + 1} samples" in capsys.readouterr().err
    assert "parallel" not in before["request"]
    assert after["request"]["parallel"] is True
    assert before["calls"] == 18 < after["calls"]
    assert np.abs(parallel - plain).max() <= 4, "of 255"
    again, _ = drawn("again", parallel=True, batch_size=3)
    assert np.array_equal(again, parallel)


@pytest.mark.parametrize("sampler", ["rk45", "mala"])
def test_a_sampler_that_has_no_parallel_form_is_refused_before_anything_is_stored(
    run_url: str, tmp_path: Path, sampler: str
) -> None:
    with pytest.raises(UserError, match="can't run in parallel in time"):
        sample_to(str(tmp_path / "x.npz"), run_url, None, Request(1, sampler=sampler, parallel=True))
    assert not list(tmp_path.iterdir())
