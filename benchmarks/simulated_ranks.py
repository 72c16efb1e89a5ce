"""Ranks of a large run one after another in this process, and what each asks of a real S3 server; for `scale.py`.

Every rank calls the functions that a worker calls. Requests are those that the server counted (SeaweedFS' own
counters), so a retry or a second page of a listing counts too; rank 0's are those made while it alone was at work.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from scoreray.data.storage import local_s3
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.ports import free_ports
from scoreray.data.storage.store import Store, open_store
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.monitoring.vote import Vote
from scoreray.trainer.optim.fragments import MASTER, Fragment

BUCKET = "scale"
PIECE = 16  # elements of a parameter that a rank holds
NUM_SHARDS, SHARD_SAMPLES = 100_000, 10_000  # 1e9 samples
IMAGES_PER_RANK = 32
COUNTED = re.compile(r'SeaweedFS_s3_request_total\{bucket="(\w*)",code="\d+",type="(\w+)"\} (\d+)')


class CountedS3(LocalS3):
    """A local S3 server that says how many requests of each kind it had."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metrics_port = free_ports(None)[0]

    def start(self) -> LocalS3:
        more = [f"-metricsPort={self.metrics_port}", "-metricsIp=127.0.0.1"]
        arguments = local_s3._arguments
        with mock.patch.object(local_s3, "_arguments", lambda *given: [*arguments(*given), *more]):
            super().start()
        os.environ.update(self.env)
        self.create_bucket(BUCKET)
        return self

    def requests(self) -> Counter[str]:
        return requests_at(self.metrics_port)

    @contextmanager
    def measured(self) -> Iterator[SimpleNamespace]:
        """`requests` by kind, `seconds` and `cpu_s` of this process, filled in at the end."""
        found = SimpleNamespace()
        before, wall, cpu = self.requests(), time.perf_counter(), time.process_time()
        yield found
        found.seconds, found.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        found.requests = self.requests() - before


def requests_at(metrics_port: int) -> Counter[str]:
    """The server's requests so far, by kind, of the benchmark's bucket."""
    time.sleep(0.05)  # it counts a request after it has answered
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for bucket, kind, count in COUNTED.findall(text):
        found[kind] += int(count) if bucket == BUCKET else 0
    return found


def fragments(num_parameters: int, rank: int, world_size: int) -> list[Fragment]:
    """As ZeRO-3 has it: of every parameter each rank holds a piece."""
    return [Fragment(f"layers.{i}.weight", PIECE * rank, PIECE, {MASTER: torch.full((PIECE,), float(rank))})
            for i in range(num_parameters)]  # fmt: skip


def commit(s3: CountedS3, ranks: int, num_parameters: int, *, replicated: bool = False) -> dict[str, Any]:
    """The second commit of `ranks` ranks, and the restore of the first and the last rank.

    Ranks take turns, rank 0 last: so its requests are known, and its time is what is left when all shares are stored.
    """
    run = open_store(f"s3://{BUCKET}/commit-{ranks}-{replicated}")
    pieces = 1 if replicated else ranks
    shapes = {f.name: [PIECE * pieces] for f in fragments(num_parameters, 0, 1)}
    module = torch.nn.Module()
    options: dict[str, Any] = {"attempt": "one", "world_size": ranks, "keep": 1, "num_shares": pieces}
    first = CheckpointWriter(run, rank=0, **options)
    for number in (1, 2):  # the second has one to remove
        marker = Marker(100 * number, number, {}, shapes, [], {}, 1)
        with s3.measured() as others:
            for rank in range(1, ranks):
                writer = CheckpointWriter(run, rank=rank, **options)
                writer.save(marker, [] if replicated else fragments(num_parameters, rank, ranks), module)
                writer.wait()
                writer.close()
        with s3.measured() as rank_0:
            first.save(marker, fragments(num_parameters, 0, pieces), module)
            first.wait()
    first.close()
    found = {
        "ranks": ranks,
        "commit": _answer(others.requests + rank_0.requests),
        "commit, rank 0": _answer(rank_0.requests),
        "commit, rank 0: s": rank_0.seconds,
        "commit, rank 0: CPU s": rank_0.cpu_s,
        "commit, another rank: CPU s": others.cpu_s / max(1, ranks - 1),
    }
    with s3.measured() as looked:
        checkpoint = latest(run)
    assert checkpoint is not None
    assert checkpoint.images_seen == 200
    found |= {"marker: bytes": run.size(f"{checkpoint.folder}/COMMITTED.json"),
              "newest checkpoint": _answer(looked.requests), "newest checkpoint: CPU s": looked.cpu_s}  # fmt: skip
    for rank in {0, ranks - 1}:
        share = fragments(num_parameters, 0 if replicated else rank, pieces)
        with s3.measured() as restored:
            checkpoint.restore(share, module)
        name = "restore, rank 0" if rank == 0 else "restore, last rank"
        found |= {name: _answer(restored.requests), f"{name}: CPU s": restored.cpu_s}
    return found


def _answer(requests: Counter[str]) -> dict[str, int]:
    return {"all": requests.total(), **dict(sorted(requests.items()))}


def write_set(store: Store, folder: Path) -> None:
    """A data set that says it has 1e9 samples in 1e5 shards. What is stored are its manifest, and the shard and the
    part of the index that all of them share, which `as_many_shards` reads for each."""
    from scoreray.data.packing.pack import pack
    from scoreray.data.reading.manifest import MANIFEST, Manifest

    images = np.random.default_rng(0).integers(0, 256, (SHARD_SAMPLES, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    pack(str(folder / "images.npz"), str(folder / "packed"), samples_per_shard=SHARD_SAMPLES)
    one = Manifest.load(open_store(folder / "packed"))
    (shard,) = one.shards
    for name in (shard.name, one.index.name):
        store.put(name, folder / "packed" / name)
    shards = [replace(shard, name=f"shards/{i:06d}.tar") for i in range(NUM_SHARDS)]
    large = replace(
        one, num_samples=NUM_SHARDS * SHARD_SAMPLES, shards=shards,
        index=replace(one.index, bytes=NUM_SHARDS * one.index.bytes, sha256=hashlib.sha256().hexdigest()),
    )  # fmt: skip
    store.put(MANIFEST, large.to_json().encode())


STREAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from simulated_ranks import opened_stream
print(json.dumps(opened_stream(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
"""


def stream(s3: CountedS3, url: str, rank: int, ranks: int) -> dict[str, Any]:
    """A rank's stream in a process of its own: opened, and its first batch."""
    before = s3.requests()
    command = [sys.executable, "-c", STREAM, str(Path(__file__).parent), url, str(rank), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the stream failed:\n{done.stderr[-3000:]}")
    return {"rank": rank, "ranks": ranks, **json.loads(done.stdout), "requests": _answer(s3.requests() - before)}


def opened_stream(url: str, rank: int, ranks: int) -> dict[str, float]:
    """In that process: seconds, CPU seconds and memory of opening and of the first batch, CPU time of a later one."""
    from scoreray.data.reading.stream import Stream

    found: dict[str, float] = {}
    before = most_kb()
    wall, cpu = time.perf_counter(), time.process_time()

    def note(what: str) -> None:
        nonlocal wall, cpu
        found[f"{what}: s"], found[f"{what}: CPU s"] = time.perf_counter() - wall, time.process_time() - cpu
        found[f"{what}: MB"] = (most_kb() - before) / 1024
        wall, cpu = time.perf_counter(), time.process_time()

    as_many_shards()
    batch, lanes = IMAGES_PER_RANK * ranks, max(ranks, IMAGES_PER_RANK)
    with Stream(url, global_batch_size=batch, rank=rank, world_size=ranks, seed=0, num_lanes=lanes,
                position=7 * NUM_SHARDS * SHARD_SAMPLES + 12_345 * batch, prefetch_batches=1) as opened:  # fmt: skip
        note("open")
        next(iter(opened))
        note("first batch")
        rows, start = opened._rows, opened.position
        for i in range(100):
            rows.lanes.positions(start + i * batch, 1)
        found["positions of a batch: CPU us"] = (time.process_time() - cpu) / 100 * 1e6
    return found


def most_kb() -> int:
    """The most memory that this process has had; `getrusage` would include that of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def as_many_shards() -> None:
    """Has this process read the one stored shard, and its part of the index, for each of the manifest's."""
    from scoreray.data.fields.record_layout import CHUNK, DIGEST_BYTES, RECORD
    from scoreray.data.storage.s3 import S3Store

    get = S3Store.get
    records, chunks = SHARD_SAMPLES * RECORD.itemsize, -(-SHARD_SAMPLES // CHUNK) * DIGEST_BYTES

    def one(self: S3Store, key: str, start: int | None = None, end: int | None = None) -> bytes:
        if key.startswith("shards/"):
            key = "shards/000000.tar"
        if key == "index.bin" and start is not None and end is not None:
            size, digests = end - start, NUM_SHARDS * records
            start = start % records if start < digests else records + (start - digests) % chunks
            end = start + size
        return get(self, key, start, end)

    S3Store.get = one  # type: ignore[method-assign]


def votes(ranks: int, num_steps: int = 60) -> dict[str, float]:
    """Ranks as threads that vote at each step: reads of the rendezvous store, CPU time; and the same by a sum around a
    ring, whose messages follow one another, so that the CPU time of all ranks is the least that it can take."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as workers have it (`worker_environment`)
    store = _CountedStore(dist.HashStore())
    found: list[Vote] = [None] * ranks  # type: ignore[list-item]
    groups: list[Any] = [None] * ranks

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=300))
        found[rank] = Vote(ranks, group=groups[rank])

    def steps(rank: int) -> None:
        for _ in range(num_steps):
            found[rank].cast(0)  # type: ignore[arg-type]
        found[rank].close()

    _at_once(join, ranks)
    _at_once(steps, ranks)  # connections are made when they are first used
    cpu = time.process_time()
    _at_once(steps, ranks)
    spent, reads = time.process_time() - cpu, store.reads

    def ring(rank: int) -> None:
        ballot = torch.zeros(1, dtype=torch.int32)
        for _ in range(num_steps):
            groups[rank].allreduce([ballot], dist.ReduceOp.MAX).wait()

    _at_once(ring, ranks)
    cpu = time.process_time()
    _at_once(ring, ranks)
    around = time.process_time() - cpu
    return {"ranks": ranks, "reads of the store": reads, "step: CPU us a rank": spent / num_steps / ranks * 1e6,
            "ring, all ranks: CPU us": around / num_steps * 1e6}  # fmt: skip


def _at_once(work: Any, ranks: int) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _CountedStore(dist.Store):
    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self._inner, self.reads = inner, 0

    def set(self, key: str, value: Any) -> None:
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.reads += 1
        return self._inner.get(key)

    def wait(self, keys: Any, *rest: Any) -> None:
        self._inner.wait(keys, *rest)

    def check(self, keys: Any) -> bool:
        return self._inner.check(keys)

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(key, amount)
