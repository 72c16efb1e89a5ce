"""`scoreray clean`: what killed starts left goes, in folders and in S3; what is committed, in use or foreign stays."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoreray.cluster.verbs.leftovers import clean, parse_age, store_time
from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.data.storage.lease import Lease
from scoreray.data.storage.s3_access import client
from scoreray.data.storage.store import Store, open_store

DAY_S = 86400.0
CONFIG = b"run: {name: a}\ndata: {url: x}\nduration: {images: 100}\n"
KEPT = {
    "run/config.yaml": CONFIG,
    "run/owner": b"newest",
    "run/checkpoints/000000000064-old/COMMITTED.json": b"{}",
    "run/checkpoints/000000000064-old/rank-00000.safetensors": b"x" * 100,
    "run/metrics/000000000064.jsonl": b'{"loss": 0.5}\n',
    "run/notes/checkpoints/000000000001-a/mine.txt": b"mine",
    "run/checkpoints/readme.txt": b"mine",
    "elsewhere/checkpoints/000000000064-a/rank-00000.safetensors": b"no run here",
    "elsewhere/shards/000000.tar": b"no pack here",
    "samples.unfinished/mine.txt": b"mine",
    "scoreray-probe-mine": b"0123456789abcdef",
    "mine.txt": b"mine",
    "model/model.json": b"{}",
    "model/ema-0.050.safetensors": b"whole",
    "half/mine.safetensors": b"mine",
}
LEFT = {
    "run/checkpoints/000000000096-killed/rank-00000.safetensors": b"y" * 50,
    "run/checkpoints/000000000096-killed/rank-00000.json": b"{}",
    "run/snapshots/000000000096-killed/rank-00000.safetensors": b"z",
    "pack/packing/plan": b"ab" * 32 + b" " + b"cd" * 32,
    "pack/packing/000000": b"{}",
    "pack/shards/000000.tar": b"t" * 30,
    "pack/shards/000001.tar": b"t" * 30,
    "model/model.unfinished.json": b'{"last": "model.json", "files": ["ema-0.050.safetensors"], "id": "a"}',
    "half/model.unfinished.json": b'{"last": "model.json", "id": "b", "files": ["ema-0.050.safetensors", '
    b'"ema-0.100.safetensors", "vae/config.json", "../mine.txt"]}',
    "half/vae/config.json": b"{}",
    "half/ema-0.050.safetensors": b"half",
    f"scoreray-probe-{uuid.UUID(int=7).hex}": b"0123456789abcdef",
}
PACK_AFTER_ITS_PLAN = sorted(LEFT, key=lambda key: not key.endswith(("plan", "unfinished.json")))


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "all") if request.param == "folder" else request.getfixturevalue("s3_url")


def fill(place: str) -> Store:
    store = open_store(place)
    for key, data in KEPT.items():
        store.put(key, data)
    for key in PACK_AFTER_ITS_PLAN:
        store.put(key, LEFT[key])
    return store


def keys(store: Store) -> set[str]:
    return {key for key, _ in store.list()}


def test_leftovers_go_after_a_day_and_nothing_else(place: str, scoreray: Callable[..., Any]) -> None:
    store = fill(place)
    now = store_time(store)
    assert clean(place, DAY_S, remove=True).found == ()  # all of it was written a moment ago
    assert keys(store) == {*KEPT, *LEFT}
    listed = clean(place, DAY_S, remove=False, now=now + 2 * DAY_S)
    assert {key for one in listed.found for key in one.keys} == set(LEFT)
    assert listed.bytes == sum(map(len, LEFT.values()))
    assert keys(store) == {*KEPT, *LEFT}  # it was a dry run
    assert clean(place, DAY_S, remove=True, now=now + 2 * DAY_S).removed
    assert keys(store) == set(KEPT)
    assert all(store.get(key) == data for key, data in KEPT.items())
    assert scoreray("clean", place).stdout == f"{store.url()}: nothing is left over\n"


def test_uploads_and_temporary_files_of_our_keys_go(place: str) -> None:
    store = fill(place)
    for key in (
        "run/checkpoints/000000000128-k/rank-00000.safetensors",
        "half/ema-0.100.safetensors",
        "elsewhere/mine.bin",
    ):
        if store.is_remote:
            bucket, _, prefix = place.removeprefix("s3://").partition("/")
            upload = client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")
            named = {"Bucket": bucket, "Key": f"{prefix}/{key}", "UploadId": upload["UploadId"]}
            client().upload_part(**named, PartNumber=1, Body=b"p" * 77)
        else:
            path = Path(place, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".part-{path.name}-ab12cd34").write_bytes(b"p" * 77)
    written = {one.key: one for one in store.unfinished()}
    assert {one.bytes for one in written.values()} == {77}
    assert all(abs(one.written_s - time.time()) < 600 for one in written.values())
    clean(place, DAY_S, remove=True)
    assert len(store.unfinished()) == 3
    clean(place, DAY_S, remove=True, now=time.time() + 2 * DAY_S)
    assert [one.key for one in store.unfinished()] == ["elsewhere/mine.bin"]
    assert keys(store) == set(KEPT)


def test_what_the_newest_start_writes_stays_while_its_run_goes_on(tmp_path: Path) -> None:
    store, now = fill(str(tmp_path)), time.time()
    folder = "run/checkpoints/000000000128-newest"
    store.put(f"{folder}/rank-00000.safetensors", b"x")
    old = {key: now - 3 * DAY_S for key in keys(store) if key.startswith(folder)}
    for key, at in old.items():
        os.utime(tmp_path / key, (at, at))
    assert clean(str(tmp_path), DAY_S, remove=True, now=now).found == ()  # the run itself was written to just now
    assert keys(store) >= set(old)
    # Once nothing of the run moves any more its lease is taken first: a start that sleeps meanwhile ends, uncommitted.
    sleeper = Lease(store.child("run"), "owner", "run", "newest")
    sleeper.check()
    clean(str(tmp_path), DAY_S, remove=True, now=now + 2 * DAY_S)
    assert not keys(store) & set(old)
    with pytest.raises(UserError, match="has taken over"):
        sleeper.check()


def test_a_marker_that_comes_between_finding_and_removing_saves_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(str(tmp_path))
    late = "run/checkpoints/000000000096-killed/COMMITTED.json"
    take = type(store).objects

    def objects(self: Store, prefix: str = "") -> Any:
        if prefix.startswith("run/checkpoints/"):
            store.put(late, b"{}")
        return take(self, prefix)

    monkeypatch.setattr(type(store), "objects", objects)
    clean(str(tmp_path), DAY_S, remove=True, now=time.time() + 2 * DAY_S)
    assert {key for key in LEFT if "checkpoints/" in key} | {late} <= keys(store)


def test_tars_that_are_indexed_in_place_are_not_a_packs_leftovers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 256, (20, 8, 8), np.uint8))
    data = str(tmp_path / "data")
    pack(tmp_path / "a.npz", data, samples_per_shard=5)
    store = open_store(data)
    tars = {key for key in keys(store) if key.endswith(".tar")}
    for key in keys(store) - tars:
        store.delete([key])

    def killed(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(data, data, map_shards=killed)
    assert store.get("packing/plan").split()[2] == b"in-place"
    clean(data, DAY_S, remove=True, now=time.time() + 2 * DAY_S)
    assert keys(store) == tars
    assert pack(data, data).num_samples == 20


@pytest.mark.parametrize("seed", range(3))
def test_whatever_else_lies_there_stays(tmp_path: Path, seed: int) -> None:
    """Foreign objects with names like ours, everywhere."""
    chance, store = random.Random(seed), fill(str(tmp_path))
    names = ("a", "config.yaml", "checkpoints/1-a/x", "shards/000000.tar", "packing/000001", "owner", "manifest.json",
             "checkpoints/000000000001/rank-00000.json", "x.npz.unfinished/a", "scoreray-probe-12")  # fmt: skip
    foreign = {f"{chance.choice(['', 'x/', 'y/z/', 'elsewhere/'])}{chance.choice(names)}" for _ in range(60)}
    for key in foreign:
        store.put(key, chance.choice([b"", b"{}", b"a: 1", b"\xff"]))
    clean(str(tmp_path), DAY_S, remove=True, now=time.time() + 2 * DAY_S)
    assert keys(store) == {*KEPT, *foreign}


def test_ages() -> None:
    assert [parse_age(text) for text in ("1h", "1.5d", "2w", "90m")] == [3600, 129600, 1209600, 5400]
    for text in ("", "1", "d", "-1d", "1y", "59m", "0d", "1d2h"):
        with pytest.raises(UserError, match="--older-than"):
            parse_age(text)
