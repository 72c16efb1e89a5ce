"""A disk that is full, a place that can't be written to, and data sets' own files with other bytes: one line each."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S

from scoreray.data.errors import DataError, ScorerayError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import INDEX, MANIFEST, Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.seal import sealed
from scoreray.data.storage.store import open_store


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "scoreray.cluster.cli", "data", "pack", *arguments, "--workers", "1"]
    return subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE_S, **options)


@pytest.fixture
def noise(tmp_path: Path) -> str:
    """Pictures that no codec makes smaller: 3 MB in 30 shards of 100 kB."""
    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (300, 100, 100), np.uint8))
    return str(tmp_path / "noise.npz")


def assert_goes_on(noise: str, url: Path, tmp_path: Path) -> None:
    """The same command finishes the pack, with the bytes of one that never ran out of space."""
    assert not (url / MANIFEST).exists()
    kept = len(list(url.glob("packing/0*")))
    assert kept > 3
    done = command(noise, str(url), "--samples-per-shard", "10")
    assert done.returncode == 0, done.stderr
    assert f"30 shards, {kept} of them made before" in done.stderr
    pack(noise, tmp_path / "whole", samples_per_shard=10)
    one, other = open_store(url), open_store(tmp_path / "whole")
    assert {k: one.get(k) for k, _ in one.list()} == {k: other.get(k) for k, _ in other.list()}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_full_is_one_line_and_the_pack_goes_on(noise: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        result = command(noise, str(disk / "set"), "--samples-per-shard", "10")
        assert result.returncode == 3, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert "no space left on this disk; free some, or give a URL on another" in last
        assert "Traceback" not in result.stderr
        shutil.copytree(disk / "set", tmp_path / "set")  # a larger disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert_goes_on(noise, tmp_path / "set", tmp_path)


def test_a_limit_on_files_is_one_line(noise: str, tmp_path: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    result = command(noise, str(tmp_path / "set"), "--samples-per-shard", "10", preexec_fn=limit)
    assert result.returncode == 3, result.stderr
    assert "a file may not grow that large here (ulimit -f)" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_place_that_is_a_file_or_read_only_is_one_line(noise: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place, words in ((tmp_path / "file", "a folder was expected"), (Path("/proc/x"), "/proc/x")):
        result = command(noise, str(place))
        assert result.returncode == 3, result.stderr
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


QUICK = settings(max_examples=80, deadline=5000, derandomize=True)


def refused(what: Any) -> bool:
    try:
        what()
    except ScorerayError as error:
        return "\n" not in str(error)
    return False


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@QUICK
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_manifest(data: bytes) -> None:
    assert refused(lambda: Manifest.from_json(data))


@QUICK
@given(data=st.data())
def test_a_manifest_with_another_value(data: st.DataObject, packed: tuple[str, Manifest]) -> None:
    """Refused, or a manifest still: counts that add up, names that stay inside. Sealed, as who changes it can."""
    fields = json.loads(packed[1].to_json())
    del fields["sha256"]
    where = data.draw(st.sampled_from([fields, fields["shards"][3], fields["index"]]))
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(json_values)
    try:
        found = Manifest.from_json(sealed([f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]))
    except DataError:
        return
    assert sum(shard.num_samples for shard in found.shards) == found.num_samples
    assert all(".." not in shard.name.split("/") and not shard.name.startswith("/") for shard in found.shards)


def test_an_index_with_another_byte_anywhere_gives_no_other_sample(
    packed: tuple[str, Manifest], tmp_path: Path
) -> None:
    url = tmp_path / "set"
    shutil.copytree(packed[0], url)
    index = (url / INDEX).read_bytes()
    expected = read_samples(packed[0], [0, 130, 500])
    chance = np.random.default_rng(0)
    seen = 0
    for _ in range(60):
        changed = bytearray(index)
        changed[chance.integers(len(index))] ^= 1 << chance.integers(8)
        (url / INDEX).write_bytes(bytes(changed) if chance.random() < 0.7 else index[: chance.integers(len(index))])
        try:
            assert (read_samples(str(url), [0, 130, 500]) == expected).all()
        except DataError as error:
            seen += "index.bin" in str(error)
        assert verify(str(url)), "verify reads all of it"
    assert seen > 20
