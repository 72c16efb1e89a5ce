"""What an engine takes at its peak is what the planner says (31 M parameters, two ranks)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scoreray.trainer.engine.buckets import bucket_sizes
from scoreray.trainer.engine.planner import bytes_per_parameter

pytestmark = pytest.mark.timeout(700)  # on a machine that is busy with other tests, processes take minutes to start
RANKS = Path(__file__).with_name("memory_ranks.py")
OF_ITS_OWN_MAPPING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def peaks(free_port: Callable[[], int]) -> dict[str, float]:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(RANKS), str(rank), "2", str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **OF_ITS_OWN_MAPPING},
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return json.loads(outputs[0].strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of resident memory here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_peak_bytes_per_parameter_are_the_formulas(peaks: dict[str, float], stage: int, precision: str) -> None:
    formula = bytes_per_parameter(stage, 2, half=precision == "bf16")
    assert peaks[f"{stage} {precision}"] == pytest.approx(formula, rel=0.10)


@pytest.mark.parametrize("num_params", [10**6 + 1, 10**8 + 9, 10**10])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buffers_are_parts_of_the_model(num_params: int, stage: int) -> None:
    for name, elements in bucket_sizes(num_params, stage).items():
        assert 0 < elements <= max(num_params // 8 + 128, 1 << 21), name
        assert elements % 2 == 0 or name == "stage3_param_persistence_threshold", name
