"""What a rank does for a step, a commit or a start does not grow with the number of ranks, counted at 2 and 8."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.reading.batches import RankLanes
from scoreray.data.storage.paths import PathStore
from scoreray.data.storage.stats import ReadStats
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.monitoring.meter import SHOW_EVERY_S, StepMeter
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.monitoring.vote import Vote
from scoreray.trainer.on_ray.run import check_interval_s
from scoreray.trainer.optim.fragments import MASTER, Fragment

SIZES = (2, 8)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of all stores that are paths, by kind; a listing is one request for 1,000 keys."""
    found: Counter[str] = Counter()
    for kind in ("get", "put", "list", "delete"):
        method: Any = getattr(PathStore, kind)

        def counted(self: PathStore, *arguments: Any, kind: str = kind, method: Any = method) -> Any:
            found[kind] += 1
            return method(self, *arguments)

        monkeypatch.setattr(PathStore, kind, counted)
    return found


def second_commit(
    folder: Path, ranks: int, num_shares: int, requests: Counter[str]
) -> tuple[Counter[str], Counter[str]]:
    """The requests of a rank other than 0, and of rank 0 once the others' shares are stored."""
    run, module = PathStore(str(folder)), torch.nn.Module()
    writers = [
        CheckpointWriter(run, attempt="one", rank=r, world_size=ranks, keep=1, num_shares=num_shares)
        for r in range(ranks)
    ]
    of_another, of_rank_0 = Counter[str](), Counter[str]()
    for number in (1, 2):
        marker = Marker(100 * number, number, {}, {"p": [num_shares]}, [], {}, 1)
        for rank in reversed(range(ranks)):
            before = Counter(requests)
            writers[rank].save(marker, [Fragment("p", rank, 1, {MASTER: torch.full((1,), float(rank))})], module)
            writers[rank].wait()
            if rank == 1:
                of_another = requests - before
            elif rank == 0:
                of_rank_0 = requests - before
    for writer in writers:
        writer.close()
    newest = latest(run)
    assert newest is not None
    assert newest.full_state()["p"].tolist() == list(range(num_shares))
    return of_another, of_rank_0


def test_of_a_replicated_state_rank_0_alone_commits(tmp_path: Path, requests: Counter[str]) -> None:
    two, eight = (second_commit(tmp_path / str(n), n, 1, requests) for n in SIZES)
    assert two == eight
    assert two[0].total() == 0
    assert two[1].total() <= 10


def test_of_a_sharded_state_a_commit_grows_by_a_table_a_rank(tmp_path: Path, requests: Counter[str]) -> None:
    """Each rank puts its share and the table of it; rank 0 reads the tables, and lists no more than for two ranks."""
    two, eight = (second_commit(tmp_path / str(n), n, n, requests) for n in SIZES)
    assert two[0] == eight[0] == {"put": 2}
    assert eight[1] - two[1] == {"get": 6}
    assert not two[1] - eight[1]


def test_a_commit_waits_for_a_late_rank_without_a_request_for_each(tmp_path: Path, requests: Counter[str]) -> None:
    """While nothing has come, a look is one listing."""
    run = PathStore(str(tmp_path))
    writer = CheckpointWriter(run, attempt="one", rank=0, world_size=8, keep=1, timeout_s=0.3)
    marker = Marker(100, 1, {}, {"p": [8]}, [], {}, 1)
    writer.save(marker, [Fragment("p", 0, 1, {MASTER: torch.zeros(1)})], torch.nn.Module())
    with pytest.raises(Exception, match="rank 1's share did not arrive"):
        writer.wait()
    assert requests["get"] <= 4  # of the lease
    assert requests["list"] <= 20


class Mailbox:
    """A process group of ranks that take turns in one thread: `send` and `recv` of torch's."""

    def __init__(self, rank: int, ranks: int, boxes: dict[tuple[int, int], deque[int]]) -> None:
        self._rank, self._boxes, self.sent = rank, boxes, 0

    def rank(self) -> int:
        return self._rank

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
        self.sent += 1
        self._boxes.setdefault((self._rank, to), deque()).append(int(tensors[0]))
        return _Message(lambda: None)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        return _Message(lambda: tensors[0].fill_(self._boxes[source, self._rank].popleft()))


class _Message:
    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 13])
def test_a_vote_is_one_message_a_step_and_all_ranks_decide_at_the_same_step(ranks: int) -> None:
    rounds = (ranks - 1).bit_length()
    for at, voter in itertools.product(range(2 * rounds), {0, 1, ranks - 1}):
        boxes: dict[tuple[int, int], deque[int]] = {}
        groups = [Mailbox(rank, ranks, boxes) for rank in range(ranks)]
        votes = [Vote(ranks, group=group) for group in groups]
        decided = []
        for step in range(6 * rounds):
            answers = {
                vote.cast(LoopRequest.SAVE if (step, rank) == (at, voter) else LoopRequest.NOTHING)
                for rank, vote in enumerate(votes)
            }
            assert len(answers) == 1, "ranks differ"
            decided += [step] if answers == {LoopRequest.SAVE} else []
        (once,) = decided
        assert rounds <= once - at <= 2 * rounds - 1
        assert {group.sent for group in groups} == {6 * rounds}


@pytest.mark.parametrize("ranks", [1, 2, 8, 1024])
def test_positions_of_a_batch_are_those_of_the_ranks_lanes(ranks: int) -> None:
    batch, lanes = 4 * ranks, 2 * ranks
    mine = [RankLanes(batch, rank, ranks, lanes).positions(3 * batch, 2) for rank in {0, ranks // 2, ranks - 1}]
    for rank, found in zip({0, ranks // 2, ranks - 1}, mine, strict=True):
        expected = [p for p in range(3 * batch, 5 * batch) if p % lanes // 2 == rank]
        assert found.tolist() == expected
        assert found.dtype == np.int64


def test_a_ranks_positions_take_no_memory_of_the_global_batch() -> None:
    def most(ranks: int) -> int:
        lanes = RankLanes(32 * ranks, ranks - 1, ranks, ranks)
        lanes.positions(0, 1)
        tracemalloc.start()
        lanes.positions(32 * ranks, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert most(1024) < 2 * most(2)


def test_progress_is_reported_by_time_and_not_by_step() -> None:
    meter, shown = StepMeter(1, torch.device("cpu")), []
    for images in range(1, 200):
        meter.show(shown.append, images, 1000, None, 0)
    meter.record(200, 1e-3, 1.0, 0, 0, ReadStats())
    assert len(shown) <= 2, f"more than one each {SHOW_EVERY_S} s"


def test_checks_of_workers_are_no_more_a_second_with_more_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    assert [check_interval_s(workers) for workers in (2, 8, 256)] == [0.5] * 3
    assert 8192 / check_interval_s(8192) == 1024 / check_interval_s(1024)


def test_a_start_and_a_commit_of_other_ranks_ask_nothing_of_the_store(
    small_run: Callable[..., dict[str, Any]], run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    """Two starts of a replicated run on 2 and 6 ranks, with a quarantine: in the second, rank 0 restores for all."""
    settings = small_run("run", tmp_path / "runs", 48, checkpoint={"every_images": 12}, log={"every_images": 12})
    settings["data"] |= {"on_error": "quarantine", "global_batch_size": 12}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run_ranks(Path(__file__).with_name("growth_ranks.py"), str(tmp_path), worlds=(2, 2, 6, 6))
    two, six = (
        [json.loads((tmp_path / f"{world}-1-{rank}.json").read_text()) for rank in range(world)] for world in (2, 6)
    )
    assert two[0]["requests"]["get checkpoints"] >= 2
    assert two[0]["requests"] == pytest.approx(six[0]["requests"], abs=2)  # a check of the lease by time
    for other in (*two[1:], *six[1:]):
        assert other == {"requests": {}, "reports": 0}
