"""`data verify`: every member of every field, its values, and the statistics of all."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoreray.data.fields.field import Field
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.storage.store import open_store

COUNT = 12
LATENTS = np.random.default_rng(0).standard_normal((COUNT, 2, 3)).astype(np.float16)
FIELDS = [
    Field("latent", "array", [2, 3], "float16", "npy",
          mean=LATENTS.astype(float).mean((0, 2)).tolist(), std=LATENTS.astype(float).std((0, 2)).tolist()),
    Field("t5", "sequence", [3, 2], "bfloat16", "t5.raw"),
    Field("place", "scalar", [], "float32", "json", low=[0.0], high=[11.0]),
    Field("label", "class", [], "int64", "cls", classes=["a", "b"], class_counts=[6, 6]),
    Field("caption", "text", [5], "uint8", "txt"),
    Field("note", "json", [2], "uint8", "json"),
]  # fmt: skip


def samples() -> list[dict[str, Any]]:
    found = []
    for i in range(COUNT):
        out = io.BytesIO()
        np.save(out, LATENTS[i])
        found.append({
            "latent": ("npy", out.getvalue()), "t5": ("raw", np.full((i % 4, 2), 0x3F80, np.uint16).tobytes()),
            "place": i, "label": i % 2, "caption": ("txt", b"abcde"[: i % 6]), "note": ("json", b"{}"),
        })  # fmt: skip
    return found


WriteFields = Callable[..., Manifest]


def test_a_whole_data_set_has_no_problem(write_fields: WriteFields, tmp_path: Path) -> None:
    write_fields(tmp_path / "set", FIELDS, samples(), samples_per_shard=5)
    assert verify(str(tmp_path / "set")) == []


def test_values_are_named_by_sample_field_and_index(write_fields: WriteFields, tmp_path: Path) -> None:
    rows = samples()
    wrong = LATENTS[7].copy()
    wrong[1, 2] = np.nan
    out = io.BytesIO()
    np.save(out, wrong)
    rows[7] |= {"latent": ("npy", out.getvalue())}
    rows[2] |= {"t5": ("raw", np.array([[0x3F80, 0x3F80], [0x3F80, 0xFF80]], np.uint16).tobytes())}  # -inf
    rows[3] |= {"place": np.inf, "caption": ("txt", b"\xff")}
    rows[4] |= {"label": 2, "note": ("json", b"{")}
    rows[5] |= {"caption": ("txt", b"abcdef")}
    write_fields(tmp_path / "set", FIELDS, rows)
    expected = [
        r"sample 2 at byte \d+: field 't5': -inf at [1, 1]; all must be finite",
        r"sample 3 at byte \d+: field 'caption': is no UTF-8",
        r"sample 3 at byte \d+: field 'place': inf at its only value",
        r"sample 4 at byte \d+: field 'label': class 2, the manifest names 2",
        r"sample 4 at byte \d+: field 'note': is no JSON",
        r"sample 5 at byte \d+: field 'caption': has 6 bytes, the manifest says 5 at most",
        r"sample 7 at byte \d+: field 'latent': nan at [1, 2]; all must be finite",
    ]
    problems = verify(str(tmp_path / "set"))
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        start, end = part.split(r"\d+")
        assert start in problem
        assert end in problem


@pytest.mark.parametrize("member", ["npy", "t5.raw", "txt", "json"])
def test_a_flipped_bit_in_any_member_is_found(member: str, write_fields: WriteFields, tmp_path: Path) -> None:
    manifest = write_fields(tmp_path / "set", FIELDS, samples())
    records = np.frombuffer(
        (tmp_path / "set" / "index.bin").read_bytes()[: COUNT * manifest.record.itemsize], manifest.record
    )
    tar = tmp_path / "set" / manifest.shards[0].name
    data = bytearray(tar.read_bytes())
    for place in (5, 7):
        data[int(records["offset"][place, manifest.members.index(member)])] ^= 1
    tar.write_bytes(data)
    shard, *problems = verify(str(tmp_path / "set"))
    assert "its SHA-256 is not the manifest's" in shard
    assert [f"sample {place} at byte" in problem for place, problem in zip((5, 7), problems, strict=True)] == [
        True,
        True,
    ]
    assert all(f"member .{member}: its bytes are not those of the index" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("latent", {"mean": [0.5, 0.5]}, "'latent': its mean is"),
        ("place", {"high": [12.0]}, "'place': its high is [11.0], the manifest says [12.0]"),
        ("label", {"class_counts": [5, 7]}, "'label': its class_counts is [6, 6], the manifest says [5, 7]"),
        ("caption", {"shape": [6]}, "'caption': its shape is [5], the manifest says [6]"),
        ("t5", {"std": [1.0, 1.0], "mean": [1.0, 1.0]}, "'t5': its std is [0.0, 0.0]"),
    ],
)
def test_statistics_that_are_not_those_of_the_samples_are_found(
    name: str, change: dict[str, Any], message: str, write_fields: WriteFields, tmp_path: Path
) -> None:
    fields = [replace(field, **change) if field.name == name else field for field in FIELDS]
    write_fields(tmp_path / "set", fields, samples())
    (problem,) = verify(str(tmp_path / "set"))
    assert message in problem
    assert MANIFEST in problem


def test_the_statistics_of_version_2_are_checked_too(packed: tuple[str, Manifest], tmp_path: Path) -> None:
    url, manifest = packed
    assert verify(url) == []
    store = open_store(str(tmp_path / "set"))
    for key, _ in open_store(url).list():
        store.put(key, open_store(url).get(key))
    changed = replace(manifest, mean=[manifest.mean[0] + 0.01])
    store.put(MANIFEST, changed.to_json().encode())
    (problem,) = verify(str(tmp_path / "set"))
    assert "field 'image': its mean is" in problem
    assert json.loads(store.get(MANIFEST))["version"] == 2
