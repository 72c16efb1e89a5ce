"""What an idempotency key costs: requests a second and p50 latency of a service, with and without keys.

    scoreray serve RUN --precision fp32 --compile off --port 8000 &
    python benchmarks/keys.py http://127.0.0.1:8000

RUN is best a small one (points in the plane), so that the network takes little of a request. Each part sends `--count`
requests of one sample and two Euler steps from 8 threads, three times; the best of the three counts, as others may use
the machine. `again` sends keys that are answered already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import urllib3

BODY = json.dumps({"count": 1, "steps": 2, "sampler": "euler", "seed": 1})
THREADS = 8


def measure(url: str, keys: list[str | None]) -> tuple[float, float]:
    """(requests/s, p50 in ms) of a request for each key."""
    pool = urllib3.PoolManager(maxsize=THREADS, retries=False)

    def send(key: str | None) -> float:
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        started = time.perf_counter()
        reply = pool.request("POST", f"{url}/v1/samples", body=BODY, headers=headers)
        assert reply.status == 200, reply.data
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as many:
        took = list(many.map(send, keys))
    return len(keys) / (time.perf_counter() - started), statistics.median(took) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=400)
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    known = [uuid.uuid4().hex for _ in range(arguments.count)]
    measure(url, [None] * 50)
    measure(url, list(known))
    parts = {
        "without": lambda: [None] * arguments.count,
        "keyed": lambda: [uuid.uuid4().hex for _ in range(arguments.count)],
        "again": lambda: list(known),
    }
    found = {name: [measure(url, keys()) for _ in range(3)] for name, keys in parts.items()}
    for name, rounds in found.items():
        print(f"{name:8} {max(r for r, _ in rounds):7.1f} requests/s   p50 {min(p for _, p in rounds):6.1f} ms")
    started = time.perf_counter()
    page = urllib3.request("GET", f"{url}/metrics").data
    print(f"/metrics {len(page)} bytes in {(time.perf_counter() - started) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
