"""ZeRO++ hpZ: a second copy of the weights in each group of ranks changes no step of ZeRO-3."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scoreray.data.errors import UserError
from scoreray.trainer.config import load_config

pytestmark = pytest.mark.timeout(700)  # on a machine that is busy with other tests, processes take minutes to start
RANKS = Path(__file__).with_name("hpz_ranks.py")


@pytest.mark.slow
def test_a_partition_group_changes_no_step(free_port: Callable[[], int]) -> None:
    """Four ranks in groups of two: each holds half of every weight beside its quarter, and the norms are equal."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(RANKS), str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(errors[-2000:] for _, errors in outputs)
    facts = json.loads(outputs[0][0].strip().splitlines()[-1])
    assert facts["1"]["norms"] == facts["2"]["norms"]
    assert facts["1"]["second"] == [None] * 3
    assert facts["2"]["second"] == [600 * 600 // 2] * 3


@pytest.mark.parametrize(
    ("stage", "workers", "group"), [(2, 8, 4), ("auto", 8, 4), (3, 8, 3), (3, 4, 4), (3, [2, 8], 2), (3, [6, 7], 2)]
)
def test_groups_that_do_not_go_are_refused(stage: int | str, workers: int | list[int], group: int) -> None:
    settings = {
        "run": {"name": "x", "storage": "nowhere"},
        "data": {"url": "nowhere", "global_batch_size": 840},
        "duration": {"images": 840},
        "engine": {"zero_stage": stage, "partition_group": group},
        "scaling": {"workers": workers},
    }
    with pytest.raises(UserError, match=r"engine\.partition_group"):
        load_config(settings)
