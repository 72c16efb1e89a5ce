"""Packing on Ray: the same bytes as in one process, whatever is killed on the way, and nothing left running."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner
from waiting import PATIENCE_S

from scoreray.cluster.cli.main import app
from scoreray.cluster.verbs.pack import check_nodes, map_on_ray, pack_with_bar
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import SourcePlan, pack
from scoreray.data.packing.shards import encode
from scoreray.data.sources.field_options import parse_field_options
from scoreray.data.sources.source import SourceOptions, open_source
from scoreray.data.storage.store import open_store

SIZE = {"image_size": 32, "samples_per_shard": 10}
FIELDS = ["text=text", "place=latlon"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 pictures of two classes and of any size, with metadata that only a pack with fields reads."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(400):
        path = folder / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*rng.integers(40, 90, 2), 3), np.uint8)).save(path)
    rows = [
        {"file_name": f"{'cat' if i % 2 else 'dog'}/{i}.jpg", "text": f"größe {i}" * (i % 3), "latlon": [i / 7, -i]}
        for i in range(400)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of each object, packed by one process."""
    url = tmp_path_factory.mktemp("whole") / "set"
    pack(pictures, url, **SIZE)
    return digests(url)


def digests(url: str | Path) -> dict[str, str]:
    store = open_store(url)
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key, _ in store.list()}


def num_finished(url: Path) -> int:
    return len(list(url.glob("packing/0*")))


@pytest.mark.parametrize("place", ["path", "s3"])
def test_ray_tasks_make_the_same_bytes_as_one_process(
    place: str, pictures: Path, whole: dict[str, str], tmp_path: Path, ray_cluster: None,
    request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str], new_listeners: Any,
) -> None:  # fmt: skip
    url = str(tmp_path / "set") if place == "path" else request.getfixturevalue("s3_url")
    with new_listeners() as listeners:
        pack_with_bar(str(pictures), url, workers=3, name=pictures.name, **SIZE)
    listeners.check()
    assert digests(url) == whole
    assert f"packed 400 samples in 40 shards at {url}" in capfd.readouterr().err


def test_an_array_is_read_again_by_the_tasks_not_sent_to_them(tmp_path: Path, ray_cluster: None) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 12, 12), np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    pack(tmp_path / "a.npz", tmp_path / "one", samples_per_shard=50)
    pack_with_bar(str(tmp_path / "a.npz"), str(tmp_path / "ray"), workers=2, samples_per_shard=50)
    assert digests(tmp_path / "ray") == digests(tmp_path / "one")
    np.savez(tmp_path / "b.npz", images=images[1:])
    plan = SourcePlan(str(tmp_path / "other"), "b", open_source(tmp_path / "b.npz"), 50, "png", 0)
    np.savez(tmp_path / "b.npz", images=images[::-1])
    with pytest.raises(UserError, match="is not what it was when the packing began"):
        list(map_on_ray(plan, range(6), 2))


@pytest.mark.slow
def test_a_task_that_is_killed_is_started_again(
    pictures: Path, whole: dict[str, str], tmp_path: Path, ray_cluster: None
) -> None:
    killed: list[str] = []
    done = threading.Event()

    def kill() -> None:
        while len(killed) < 3 and not done.wait(0.005):
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if title.startswith("ray::pack shard") and title not in killed:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                        killed.append(title)
                        break

    killer = threading.Thread(target=kill)
    killer.start()
    pack_with_bar(str(pictures), str(tmp_path / "set"), workers=2, name=pictures.name, **SIZE)
    done.set()
    killer.join()
    assert killed
    assert digests(tmp_path / "set") == whole


def test_what_a_task_raises_arrives_as_it_was(tmp_path: Path, ray_cluster: None) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(source / f"{i:02d}.png")
    (source / "13.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"13.png: is empty \(0 bytes\); fix or remove it, or --skip-bad N leaves out"):
        pack_with_bar(str(source), str(tmp_path / "a"), workers=2, samples_per_shard=5)
    manifest, left_out = pack_with_bar(str(source), str(tmp_path / "b"), workers=2, samples_per_shard=5, skip_bad=1)
    assert manifest.num_samples == 19
    assert left_out == [f"{source}/13.png: is empty (0 bytes)"]


def test_a_machine_that_does_not_see_the_source_is_named(
    pictures: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    plan = SourcePlan(str(tmp_path / "set"), "x", open_source(pictures, SourceOptions(32)), 10, "png", 0)
    open_store(tmp_path / "set").put("packing/plan", plan.sha256.encode())
    check_nodes(plan, "--workers 1 packs here")
    elsewhere = replace(plan, source=replace(plan.source, path="/a/disk/of/another/machine"))
    with pytest.raises(
        UserError, match=r"Ray's machine [\d.]+ \(RAY_ADDRESS=ray-head:6379\): /a/disk.*no such file; put"
    ):
        check_nodes(elsewhere, "--workers 1 packs here")
    with pytest.raises(UserError, match="is not the place that the packing began at; put the source"):
        check_nodes(replace(plan, url=str(tmp_path / "not shared")), "--workers 1 packs here")


# As `data pack`, which after four shards more than there were waits for its end.
HELD = """
import time
from scoreray.cluster.verbs import pack
from scoreray.cluster.cli.__main__ import main
made = pack.map_on_ray
def held(*arguments):
    new = 0
    for packed in made(*arguments):
        yield packed
        new += not packed.kept
        if new == 4:
            time.sleep(600)
pack.map_on_ray = held
main()
"""


def start(pictures: Path, url: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HELD, "data", "pack", str(pictures), str(url), "--workers", "2",
               "--image-size", "32", "--samples-per-shard", "10", *(f"--field={one}" for one in FIELDS)]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_pack_with_fields_that_was_stopped_or_killed_leaves_nothing_running_and_goes_on(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, finished, fields = tmp_path / "set", 0, parse_field_options(FIELDS)
    for kill in (signal.SIGINT, signal.SIGKILL):
        process = start(pictures, url)
        deadline = time.monotonic() + PATIENCE_S
        while num_finished(url) < finished + 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 2
        process.send_signal(kill)
        _, said = process.communicate(timeout=PATIENCE_S)
        if kill == signal.SIGINT:
            assert process.returncode == 130, said
            assert said.strip().splitlines()[-1].startswith("scoreray: stopped; the same command goes on")
            assert "Traceback" not in said
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive, alive
        finished = num_finished(url)
        assert not (url / "manifest.json").exists()
    pack_with_bar(str(pictures), str(url), workers=1, fields=fields, **SIZE)
    assert f", {finished} of them made before, at" in capfd.readouterr().err
    manifest = pack(pictures, tmp_path / "whole", fields=fields, **SIZE)
    assert [one.name for one in manifest.fields] == ["image", "text", "place", "label"]
    assert digests(url) == digests(tmp_path / "whole")


def test_columns_that_no_field_takes_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", x=np.eye(3), hour=np.arange(3), place=np.eye(3))
    left_out, fields = Counter[str](), parse_field_options(["hour=place"])
    pack_with_bar(str(tmp_path / "a.npz"), str(tmp_path / "set"), workers=1, fields=fields, left_out=left_out)
    said = [line for line in capsys.readouterr().err.splitlines() if "no field" in line]
    assert len(said) == 1
    assert said[0].endswith("a.npz: columns that no field takes: hour; --field NAME=hour takes one")
    assert left_out == {"hour": 3}
    np.savez(tmp_path / "b.npz", z=np.eye(3), y=np.arange(2))
    pack_with_bar(str(tmp_path / "b.npz"), str(tmp_path / "short"), workers=1)
    said = [line for line in capsys.readouterr().err.splitlines() if "no field" in line]
    assert len(said) == 1
    assert said[0].endswith("b.npz: columns that no field can take: y; y has 2 rows, and there are 3 samples")


def test_members_of_tars_that_are_not_used_are_in_the_answer(tmp_path: Path) -> None:
    def png(i: int) -> bytes:
        return encode(np.full((8, 8, 3), i, np.uint8), "png")

    with webdataset.TarWriter(str(tmp_path / "0.tar"), mtime=0) as writer:
        for i in range(3):
            writer.write({"__key__": str(i), "png": png(i), "txt": b"a caption"})
    command = ["data", "pack", str(tmp_path), str(tmp_path), "--workers", "1", "--json"]
    answer = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert (answer["num_samples"], answer["left_out"], answer["unused"]) == (3, [], {".txt": 3})
