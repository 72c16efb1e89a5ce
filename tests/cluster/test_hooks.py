"""Private names of Ray: this version has all of them, and a Ray without one starts, works and is noted in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from waiting import PATIENCE_S

from scoreray.cluster import drain, hooks
from scoreray.cluster.hooks import WITHOUT, hook, replaced
from scoreray.data.errors import UserError


@pytest.fixture
def none_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray in which every private name is gone."""
    monkeypatch.setattr(hooks, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace()))
    hooks._note.cache_clear()


@pytest.mark.parametrize("path", WITHOUT)
def test_this_ray_has_them_all(ray_cluster: None, path: str) -> None:
    assert callable(hook(path))


def test_a_function_is_replaced_for_a_block_only(ray_cluster: None) -> None:
    original = hook(hooks.PRINTED_LINES)
    with replaced(hooks.PRINTED_LINES, lambda before: (before, "ours")):
        assert hook(hooks.PRINTED_LINES) == (original, "ours")
    assert hook(hooks.PRINTED_LINES) is original


def test_a_name_that_is_gone_is_one_line(none_is_there: None, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert hook(hooks.KEY_VALUE) is None
        with replaced(hooks.GCS_PORT, lambda before: before):
            pass
    lines = " ".join(capsys.readouterr().err.split())
    for path in (hooks.KEY_VALUE, hooks.GCS_PORT):
        assert lines.count(f"has no {path}: {WITHOUT[path]}") == 1


def test_a_node_that_can_not_be_drained_says_so(none_is_there: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="this version of Ray can't be asked to"):
        drain.drain_node(1.0, "127.0.0.1:1")


def test_a_serve_at_an_unknown_address_is_refused(
    ray_cluster: None, none_is_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    from scoreray.cluster.serve.listener import start_listening

    started: list[object] = []
    monkeypatch.setattr(serve, "start", lambda **options: started.append(options["http_options"]))
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(proxies={}))
    start_listening({"host": "127.0.0.1", "port": 1}, {})
    assert started == [{"host": "127.0.0.1", "port": 1}]
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(proxies={"a": "HEALTHY"}))
    with pytest.raises(UserError, match="already runs on this cluster, at an unknown address"):
        start_listening({"host": "127.0.0.1", "port": 1}, {})
    assert len(started) == 1


ABSENT = """
import importlib, types
from scoreray.cluster import hooks
hooks.importlib = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace())
from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import autoscaler
with connected(num_cpus=1):
    import ray
    print(ray.get(ray.remote(lambda: 7).remote()), autoscaler().is_there)
"""


@pytest.mark.slow
def test_a_ray_without_them_works_all_the_same() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ABSENT], capture_output=True, text=True, timeout=PATIENCE_S, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7 False\n"
    assert done.stderr.count("note: Ray ") == 3  # two waits while it starts, and its lines on standard output
    assert "Traceback" not in done.stderr
