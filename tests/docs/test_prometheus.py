"""A real Prometheus server scrapes a real run and a sampling service: every metric of the catalogue is there."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from catalogue import RAY_GPU_METRICS, catalogue
from waiting import PATIENCE_S

from scoreray.cluster.verbs.train import train_to_end
from scoreray.sampling.http.app import make_app
from scoreray.sampling.service.config import ServeConfig
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.service import LocalBackend, Service
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.prepare import prepare_run

Query = Callable[[str], list[dict[str, Any]]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def config(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    every = {"checkpoint": {"every_images": 4_000}, "log": {"every_images": 1_000}}
    return load_config(small_run("scraped", tmp_path_factory.mktemp("scraped"), 16_000, **every), ())


@pytest.fixture(scope="module")
def prometheus(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Query, Path]]:
    """A server that scrapes the session's Ray node each second, and whatever is added to its file of targets."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    import ray

    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    node = f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"
    targets = folder / "targets.json"
    targets.write_text(json.dumps([{"targets": [node]}]))
    scrape = {
        "job_name": "all",
        "scrape_interval": "1s",
        "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}],
    }
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    server = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def query(expression: str) -> list[dict[str, Any]]:
        encoded = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{encoded}", timeout=PATIENCE_S) as answer:
            return json.load(answer)["data"]["result"]

    try:
        yield query, targets
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE_S)


def missing(query: Query, names: set[str], within_s: float) -> set[str]:
    end = time.monotonic() + within_s
    while True:
        seen = {
            one["metric"]["__name__"] for one in query('last_over_time({__name__=~"(ray_)?(scoreray|node)_.+"}[10m])')
        }
        seen |= {one["metric"]["__name__"] for one in query('{__name__=~"scoreray_.+"}')}
        left = {name for name in names if name not in seen and f"{name}_bucket" not in seen}
        if not left or time.monotonic() > end:
            return left
        time.sleep(1)


@pytest.mark.slow
def test_every_metric_of_a_run_and_of_its_node_is_scraped(prometheus: tuple[Query, Path], config: Config) -> None:
    query, _ = prometheus
    train_to_end(prepare_run(config))
    shown = catalogue()
    names = {
        one.name for board in ("training", "data", "cluster") for one in shown[board] if one not in RAY_GPU_METRICS
    }
    assert not missing(query, names, 30)
    assert {one["metric"]["run"] for one in query("last_over_time(ray_scoreray_images_seen[10m])")} >= {"scraped"}
    assert all(one["metric"]["sigma"] for one in query("last_over_time(ray_scoreray_sigma_loss[10m])"))


@pytest.mark.slow
def test_every_metric_of_a_service_is_scraped(prometheus: tuple[Query, Path], config: Config) -> None:
    import uvicorn

    query, targets = prometheus
    serving = ServeConfig((("scraped", f"{config.run.storage}/{config.run.name}"),), compile="off", precision="fp32")
    port, up, end = free_port(), threading.Event(), threading.Event()

    async def serve() -> None:
        replica = Replica(serving)
        service = Service(serving, LocalBackend(replica))
        await service.start()
        server = uvicorn.Server(uvicorn.Config(make_app(service), host="127.0.0.1", port=port, log_level="error"))
        server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        threading.Thread(target=lambda: (end.wait(), setattr(server, "should_exit", True)), daemon=True).start()
        up.set()
        await server.serve()

    import asyncio

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert up.wait(PATIENCE_S)
        targets.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"]}]))
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/samples", b'{"count": 2, "steps": 3}', {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                urllib.request.urlopen(request, timeout=PATIENCE_S).read()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as page:
            text = page.read().decode()
        names = {one.name for one in catalogue()["sampling"]}
        assert all(f"# TYPE {name.removesuffix('_total')}" in text for name in names)
        not_yet = {one.name for one in catalogue()["sampling"] if one.labels and f"\n{one.name}" not in text}
        assert "scoreray_requests_total" not in not_yet  # a counter with labels is on the page from its first count on
        assert not missing(query, names - not_yet, 20)
    finally:
        end.set()
        thread.join(20)
