"""`scoreray list` and `status`: everything of ours under a URL, in folders and in S3, whatever else lies there."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scoreray.cluster.verbs.inventory import ACTIVE_S, Stored, age, found_in, inventory, of_place, table
from scoreray.data.packing.pack import pack
from scoreray.data.storage.store import Store, open_store
from scoreray.data.units import readable_bytes
from scoreray.sampling.model.export import export
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import claim, run_store
from scoreray.tune.trial import Trial

IMAGES = 64


@pytest.fixture(scope="module")
def scene(
    small_run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Stored]]:
    """Fills a URL: a finished run, one that has begun, a study of a trial, a model, data, a killed pack."""
    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(0)
    np.savez(folder / "a.npz", images=rng.integers(0, 256, (20, 8, 8), np.uint8), labels=np.zeros(20, np.uint8))
    run = load_config(small_run("whole", folder / "runs", IMAGES, checkpoint={"every_images": 32, "keep": 2}))
    claim(run_store(run), run)
    train(run)
    export(f"{folder}/runs/whole", f"{folder}/model")

    def fill(url: str) -> dict[str, Stored]:
        store = open_store(url)
        for key, _ in open_store(folder).list():
            store.put(key, folder / key)
        begun = yaml.safe_load((folder / "runs/whole/config.yaml").read_text())
        begun["run"]["name"] = "begun"
        store.put("runs/begun/config.yaml", yaml.safe_dump(begun).encode())
        store.put("config.yaml", yaml.safe_dump(begun).encode())  # a copy, as the demo leaves one, of a run elsewhere
        pack(folder / "a.npz", f"{url}/data/images", samples_per_shard=5)
        record = {"checkpoint": "x", "request": {"count": 7}, "finished": {}}
        store.put("pictures/sampling.json", json.dumps(record).encode())
        store.put("data/killed/packing/plan", b"ab" * 32 + b" " + b"cd" * 32)
        store.put("data/killed/packing/000000", b"{}")
        sweep = {"study": {"name": "s"}, "trials": 2, "metric": {"reference": "x"}}
        store.put("study/study.json", json.dumps(sweep).encode())
        report = {"images": 32, "seq": 0, "metrics": {"denoising": 0.25}, "curve": [], "std_errors": [],
                  "checkpoint": "", "ema": None, "seconds": 1.0, "run": "run-1"}  # fmt: skip
        Trial(0, {}, "run-1", "done", [report]).save(store.child("study"))
        store.put("study/runs/run-1/config.yaml", store.get("runs/whole/config.yaml"))  # the study's, not listed
        return {one.url.removeprefix(f"{store.url()}/"): one for one in inventory(url)}

    return fill


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "all") if request.param == "folder" else request.getfixturevalue("s3_url")


def summary(found: dict[str, Stored]) -> dict[str, tuple[str, str, int | None]]:
    return {where: (one.kind, one.state, one.images) for where, one in found.items()}


EXPECTED = {
    "data/images": ("data set", "done", 20),
    "data/killed": ("data set", "under way", None),
    "model": ("model", "done", IMAGES),
    "pictures": ("samples", "done", 7),
    "runs/begun": ("run", "under way", 0),
    "runs/whole": ("run", "done", IMAGES),
    "study": ("study", "under way", 32),
}


def test_what_is_there_is_found_with_its_state_and_size(
    scene: Callable[[str], dict[str, Stored]], place: str, scoreray: Callable[..., Any]
) -> None:
    found = scene(place)
    assert summary(found) == {**EXPECTED}
    store, whole = open_store(place), found["runs/whole"]
    sizes = store.child("runs/whole").list()
    assert whole.bytes == sum(size for _, size in sizes)
    assert whole.total == IMAGES
    assert 0 < whole.metrics["loss"] < 10
    assert found["study"].metrics == {"trials": 1.0, "denoising": 0.25}
    assert found["data/killed"].metrics == {"shards": 1.0}
    later = {one.url.rpartition("/")[2]: one.state for one in inventory(place, whole.written_s + 2 * ACTIVE_S)}
    assert {name for name, state in later.items() if state == "stopped"} == {"killed", "begun", "study"}
    assert {name for name, state in later.items() if state == "done"} == {"images", "model", "pictures", "whole"}
    # The same at the very place of one, and through the command.
    assert of_place(f"{place}/runs/whole") == whole
    assert of_place(f"{place}/runs") is None
    answered = json.loads(scoreray("list", place, "--json").stdout)
    assert [one["url"].removeprefix(f"{store.url()}/") for one in answered] == sorted(EXPECTED)
    status = scoreray("status", f"{place}/runs/whole")
    assert f"state       done, {readable_bytes(whole.bytes)}, last written" in status.stdout
    lines = scoreray("list", place).stdout.splitlines()
    assert lines[0].split() == ["kind", "state", "images", "last", "metrics", "size", "written", "where"]
    assert len(lines) == 1 + len(EXPECTED)


def test_a_run_of_minutes_is_done_at_the_images_that_they_became(
    scene: Callable[[str], dict[str, Stored]], tmp_path: Path
) -> None:
    scene(str(tmp_path))
    for name in ("whole", "begun"):
        file = tmp_path / "runs" / name / "config.yaml"
        config = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**config, "duration": {"images": None, "minutes": 0.5}}))
    whole, begun = of_place(f"{tmp_path}/runs/whole"), of_place(f"{tmp_path}/runs/begun")
    assert whole is not None
    assert (whole.state, whole.images, whole.total) == ("done", IMAGES, IMAGES)
    assert begun is not None
    assert (begun.state, begun.images, begun.total) == ("under way", 0, None)


FOREIGN = (b"", b"{}", b"[1]", b"null", b"\xff\xfe", b"run: 3", b"- a", b'{"version": 2}', b"{" * 5000, b"a: *b",
           b'{"request": 7}', b'{"request": {"count": 7}}', b'{"study": 1, "trials": 2, "metric": {}}',
           os.urandom(300))  # fmt: skip
NAMES = ("config.yaml", "manifest.json", "model.json", "sampling.json", "study.json", "buckets.json", "packing/plan",
         "owner", "index.bin", "trials/00000.json", "checkpoints/000000000064-ab/COMMITTED.json", "a.txt",
         "metrics/000000000064.jsonl", "evaluations/metrics/000000000064.json", "shards/000000.tar")  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_foreign_objects_change_nothing_of_what_is_found(
    scene: Callable[[str], dict[str, Stored]], tmp_path: Path, seed: int
) -> None:
    """With our names, anywhere beside ours and above them, and with any bytes."""
    chance, place = random.Random(seed), str(tmp_path / "all")
    scene(place)
    store = open_store(place)
    for number in range(150):
        folder = chance.choice(["", "x/", "runs/", "data/", "data/x/y/", "model2/", f"z{number}/", "runs/other/"])
        store.put(folder + chance.choice(NAMES), chance.choice(FOREIGN))
    found = {one.url.removeprefix(f"{store.url()}/"): one for one in inventory(place)}
    assert {where: one for where, one in summary(found).items() if where in EXPECTED} == EXPECTED
    others = [one for where, one in found.items() if where not in EXPECTED]
    assert {one.state for one in others} <= {"unreadable"}
    assert all(one.note and "\n" not in one.note for one in others)
    text = table(list(found.values()), 0.0)
    assert len(text.splitlines()) == 1 + len(found)


def test_damage_of_ours_is_listed_as_unreadable(scene: Callable[[str], dict[str, Stored]], tmp_path: Path) -> None:
    scene(str(tmp_path))
    store: Store = open_store(tmp_path)
    store.put("data/images/manifest.json", store.get("data/images/manifest.json")[:-30])
    store.put("runs/whole/metrics/000000000064.jsonl", b"{")
    found = {one.url.removeprefix(f"{store.url()}/"): one for one in inventory(str(tmp_path))}
    assert found["data/images"].state == found["runs/whole"].state == "unreadable"
    assert "manifest.json" in found["data/images"].note
    assert "metrics/000000000064.jsonl" in found["runs/whole"].note


def test_what_is_not_there_is_one_line(scoreray: Callable[..., Any], tmp_path: Path) -> None:
    missing = scoreray("list", str(tmp_path / "none"))
    assert (missing.returncode, missing.stderr) == (2, f"scoreray: {tmp_path / 'none'}: no such folder\n")
    assert scoreray("list", str(tmp_path)).stdout == f"{tmp_path}: nothing of scoreray's is here\n"


def test_names_alone_decide_what_may_be_ours() -> None:
    assert found_in(["a/config.yaml", "b/packing/plan", "b/c/model.json", "manifest.json", "x/y.txt"]) == {
        "": "data set", "a/": "run", "b/": "data set", "b/c/": "model",
    }  # fmt: skip


def test_ages_and_sizes_are_what_people_read() -> None:
    assert [age(s) for s in (-3, 0, 119, 120, 7199, 7200, 172800)] == [
        "0 s ago", "0 s ago", "119 s ago", "2 min ago", "119 min ago", "2 h ago", "2 d ago",
    ]  # fmt: skip
    assert [readable_bytes(n) for n in (0, 999, 1000, 999_499, 999_500, 3_400_000, 10**12, 10**19)] == [
        "0 B", "999 B", "1 kB", "999 kB", "1 MB", "3.4 MB", "1 TB", "1e+04 PB",
    ]  # fmt: skip
