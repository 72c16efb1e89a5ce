"""CPU time of ranged reads from S3 by obstore and by boto3, alone and in a stream: why `data/storage/s3.py` has both.

    python benchmarks/object_store.py [--repeats 7] [--out benchmarks/results/object_store.json]

Figures are medians of the repeats, which take turns so that a busy machine slows both alike. The server (SeaweedFS)
runs on the same machine; the CPU time is that of this process, all its threads together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scoreray.data import fashion_mnist_path
from scoreray.data.packing.pack import pack
from scoreray.data.reading.stream import Stream
from scoreray.data.storage import clouds
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.store import open_store

BATCH = 256
WAYS = ("obstore", "boto3")
REQUESTS = 100
OBJECT_BYTES = 16 << 20
NUM_BATCHES = 60


@contextmanager
def reading_by(way: str) -> Iterator[None]:
    """boto3 is what a forked process reads by."""
    usable = clouds.usable_here
    if way == "boto3":
        clouds.usable_here = lambda: False
    try:
        yield
    finally:
        clouds.usable_here = usable


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the CPU."""
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def requests(size: int, repeat: int) -> tuple[float, float]:
    """(milliseconds, CPU milliseconds) of a read of `size` bytes."""
    store, chance = open_store("s3://benchmark/requests"), random.Random(repeat)
    starts = [chance.randrange(OBJECT_BYTES - size) for _ in range(REQUESTS)]

    def read() -> None:
        for start in starts:
            store.get("object", start, start + size)

    wall_s, cpu_s = timed(read)
    return 1e3 * wall_s / REQUESTS, 1e3 * cpu_s / REQUESTS


def samples(url: str) -> tuple[float, float]:
    """(samples a second, CPU microseconds a sample) of a stream, after its first batches."""
    with Stream(
        url, global_batch_size=BATCH, rank=0, world_size=1, seed=0, cache_bytes=0, num_lanes=32, shuffle_block=256
    ) as stream:
        deque(itertools.islice(stream, 4), maxlen=0)
        wall_s, cpu_s = timed(lambda: deque(itertools.islice(stream, NUM_BATCHES), maxlen=0))
    return NUM_BATCHES * BATCH / wall_s, 1e6 * cpu_s / (NUM_BATCHES * BATCH)


def floats(path: Path) -> Path:
    """12,000 arrays of 1024 floats: next to nothing to decode, so the reading shows most."""
    arrays = np.random.default_rng(0).standard_normal((12_000, 1024)).astype(np.float32)
    np.savez(path, images=arrays / 2, labels=np.arange(len(arrays)) % 10)
    return path


def measure(repeats: int, work: Callable[[int], tuple[float, float]]) -> dict[str, list[float]]:
    """Medians of both figures by each way, and the least and most of the second."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            with reading_by(way):
                found[way].append(work(repeat))
    return {
        way: [round(float(x), 3) for x in (*np.median(both, axis=0), min(b for _, b in both), max(b for _, b in both))]
        for way, both in found.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "object_store.json")
    options = arguments.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="scoreray-benchmark-") as name, LocalS3(Path(name) / "s3") as server:
        folder = Path(name)
        os.environ.update(server.env)
        server.create_bucket("benchmark")
        open_store("s3://benchmark/requests").put("object", os.urandom(OBJECT_BYTES))
        for size in (64 << 10, 640 << 10):
            title = f"{size >> 10} KB: ms, CPU ms, least, most"
            results[title] = measure(options.repeats, lambda repeat, size=size: requests(size, repeat))
        sets = {"28x28 png": fashion_mnist_path(), "1024 floats": floats(folder / "floats.npz")}
        for title, source in sets.items():
            url = f"s3://benchmark/{title.replace(' ', '-')}"
            pack(source, url, samples_per_shard=2000)
            heading = f"{title}: samples/s, CPU us a sample, least, most"
            results[heading] = measure(options.repeats, lambda _, url=url: samples(url))
    for title, ways in results.items():
        print(title, *(f"  {way}: {figures}" for way, figures in ways.items()), sep="\n", flush=True)
    options.out.write_text(json.dumps({"repeats": options.repeats} | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
