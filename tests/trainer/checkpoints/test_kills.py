"""Ranks killed at random points, and world sizes that change, without Ray: bitwise the same, and each sample once."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.packing.pack import pack
from scoreray.data.storage.store import open_store
from scoreray.data.unpacked.tar_stream import STRIDE
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.records import FINISHED_TARS, read_metrics
from scoreray.trainer.run_folder import run_store

BATCH, TOTAL, EVERY, SAMPLES = 48, 4800, 480, 600
Plan = list[tuple[int, int | None]]


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 8, 8), dtype=np.uint8)
    np.savez(folder / "p.npz", images=images, labels=np.arange(SAMPLES) % 3)
    pack(str(folder / "p.npz"), str(folder / "packed"), samples_per_shard=50)
    return str(folder / "packed")


def run_plan(
    folder: Path, data_url: str, plan: Plan, stage: int, dropout: float, ahead: int | None = None, **data: Any
) -> list[dict[str, Any]]:
    """Start after start as `plan` says; what each start was and where it began."""
    folder.mkdir()
    settings = {
        "run": {"name": "run", "storage": str(folder)},
        "data": {"url": data_url, "global_batch_size": BATCH, **data},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "dropout": dropout},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "scaling": {"workers": [1, 4]},
        "duration": {"images": TOTAL},
        "checkpoint": {"every_images": EVERY, "ahead_images": ahead},
        "log": {"every_images": 240, "tensorboard": False},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    helper = Path(__file__).with_name("kill_ranks.py")
    done = subprocess.run(
        [sys.executable, str(helper), str(folder), json.dumps(plan)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    run = run_store(load_config(json.loads((folder / "settings.json").read_text())))
    checkpoint = latest(run)
    assert checkpoint is not None
    assert checkpoint.images_seen == TOTAL
    keys = ("master", *checkpoint.marker.state_keys)
    state = {f"{key}/{name}": tensor for key in keys for name, tensor in checkpoint.full_state(key).items()}
    return state, [(record.images, record.loss) for record in read_metrics(run)]


def ledger(folder: Path, start: int, rank: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """For each step: images committed when it began (as rank 0 knows it), and its positions with their samples."""
    lines = (folder / "ledger" / f"{start}-{rank}").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("]]]")]  # not one that a kill has cut


def assert_exactly_once(folder: Path, starts: list[dict[str, Any]], samples: int = SAMPLES) -> None:
    """What counts of each start is what was committed before the next began; together that is every position once,
    and every sample once an epoch."""
    ends = [start["from"] for start in starts[1:]] + [TOTAL]
    counted: Counter[int] = Counter()
    sample_of: dict[int, int] = {}
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for rank in range(start["world"]):
            for _, pairs in ledger(folder, number, rank):
                for position, index in pairs:
                    if start["from"] <= position < end:
                        counted[position] += 1
                    assert sample_of.setdefault(position, index) == index  # also in what was redone
    assert counted == Counter(range(TOTAL))
    for epoch in range(TOTAL // samples):
        assert sorted(sample_of[epoch * samples + i] for i in range(samples)) == list(range(samples))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # up to thirteen starts of ranks, 312 s at a load of 15
@pytest.mark.parametrize(("num_kills", "ahead"), [(10, 0), (5, None)])
def test_kills_change_nothing(
    data_url: str,
    conditioned_set: str,
    conditions: dict[str, Any],
    tmp_path: Path,
    num_kills: int,
    ahead: int | None,
) -> None:
    """SIGKILL to one of two ranks at random points (ZeRO-2): every loss and every tensor bitwise as without; of the
    second plan's run, each kind of field is a condition.

    Redone is what was trained since the newest commit: one interval at most where training waits for each commit.
    Else also what was trained while the next commit travelled; the save after it waits for that one, so two intervals
    bound the sum whatever the storage does.
    """
    choose = random.Random(1)
    kills: Plan = [(2, choose.randint(1, 18)) for _ in range(num_kills)]
    fields = {} if ahead == 0 else {"conditions": conditions}
    url = conditioned_set if fields else data_url
    run_plan(tmp_path / "whole", url, [(2, None)], 2, dropout=0.1, **fields)
    starts = run_plan(tmp_path / "killed", url, [*kills, (2, None)], 2, dropout=0.1, ahead=ahead, **fields)
    state, losses = outcome(tmp_path / "whole")
    other_state, other_losses = outcome(tmp_path / "killed")
    assert other_losses == losses
    assert other_state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(other_state[name], tensor), name
    assert_exactly_once(tmp_path / "killed", starts, 100 if fields else SAMPLES)
    for number, (start, after) in enumerate(itertools.pairwise(starts)):
        steps = ledger(tmp_path / "killed", number, 0)
        reached, committed = start["from"] + BATCH * len(steps), steps[-1][0]
        assert after["from"] >= committed  # a commit that was made is found
        saved = (reached - BATCH) // EVERY * EVERY  # begun before the step that was killed
        under_way = 0 if committed == saved else reached - saved
        assert reached - after["from"] <= EVERY + under_way <= 2 * EVERY
        assert ahead is None or reached - after["from"] <= EVERY


@pytest.mark.slow
@pytest.mark.timeout(1200)  # up to thirteen starts of ranks, 312 s at a load of 15
@pytest.mark.parametrize(
    ("plan", "conditioned"),
    [([(4, 25), (2, 20), (3, 22), (2, None)], False), ([(2, 25), (1, 20), (2, None)], True)],
    ids=["classes", "conditions"],
)
def test_a_run_whose_number_of_workers_changes_sees_each_sample_once(
    data_url: str,
    conditioned_set: str,
    conditions: dict[str, Any],
    tmp_path: Path,
    plan: Plan,
    conditioned: bool,
) -> None:
    """The losses agree with those of a fixed size to the rounding of the reduction."""
    fields = {"conditions": conditions} if conditioned else {}
    url = conditioned_set if conditioned else data_url
    run_plan(tmp_path / "fixed", url, [(1, None)], 0, dropout=0, **fields)
    starts = run_plan(tmp_path / "elastic", url, plan, 0, dropout=0, **fields)
    assert [start["world"] for start in starts] == [world for world, _ in plan]
    assert all(before["from"] < after["from"] for before, after in itertools.pairwise(starts))
    assert_exactly_once(tmp_path / "elastic", starts, 100 if conditioned else SAMPLES)
    fixed, elastic = outcome(tmp_path / "fixed")[1], outcome(tmp_path / "elastic")[1]
    assert [images for images, _ in elastic] == [images for images, _ in fixed]
    for (_, one), (_, other) in zip(fixed, elastic, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow  # 27 s; one kill of such a run is in tests/trainer/on_ray/test_unpacked.py
def test_tars_without_a_manifest_in_s3_are_gone_through_by_the_tar_over_kills_and_world_sizes(
    data_url: str, s3_url: str, tmp_path: Path
) -> None:
    """Every position once; no tar is two ranks'; a resume takes none that its epoch has finished, and each other."""
    for key, _ in (packed := open_store(data_url)).list("shards/"):
        open_store(s3_url).put(key.removeprefix("shards/"), packed.get(key))
    tars, folder = f"{s3_url}/{{000000..000011}}.tar", tmp_path / "run"
    starts = run_plan(folder, tars, [(2, 30), (3, 25), (2, None)], 0, dropout=0, num_classes=3, shuffle_block=20)
    assert 0 < starts[1]["from"] < starts[2]["from"]
    run = run_store(load_config(json.loads((folder / "settings.json").read_text())))
    committed = {int(Path(key).stem): run.get(key) for key, _ in run.list(f"{FINISHED_TARS}/")}
    finished = {at: [json.loads(line) for line in lines.splitlines()] for at, lines in committed.items()}
    counted: Counter[int] = Counter()
    seen: set[int] = set()
    for number, (start, end) in enumerate(zip(starts, [*(one["from"] for one in starts[1:]), TOTAL], strict=True)):
        done: dict[int, set[int]] = {}
        for one in itertools.chain(*(lines for at, lines in finished.items() if at <= start["from"])):
            assert one["tar"] not in done.setdefault(one["epoch"], set()), "no tar is finished twice in an epoch"
            done[one["epoch"]].add(one["tar"])
        left = next(set(range(12)) - done.get(epoch, set()) for epoch in range(99) if len(done.get(epoch, ())) < 12)
        first: list[set[int]] = []
        for rank in range(start["world"]):
            pairs = [pair for _, step in ledger(folder, number, rank) for pair in step]
            counted.update(position for position, _ in pairs if start["from"] <= position < end)
            seen.update(index for position, index in pairs if position < end)
            first.append({index // STRIDE for _, index in pairs[:20]})
        if len(left) >= start["world"]:  # else a rank begins with the next epoch
            assert set.union(*first) <= left
            assert sum(map(len, first)) == len(set.union(*first)), "no tar is read by two ranks"
    assert counted == Counter(range(TOTAL))
    assert seen == {tar * STRIDE + i for tar in range(12) for i in range(50)}
