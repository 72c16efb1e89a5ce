"""Small data sets that the tests of this folder pack and read."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoreray.data.fields.field import Field
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import FORMATS, INDEX, MANIFEST, Index, Manifest, Shard, digest
from scoreray.data.reading.records import chunk_digests, index_bytes, records_sha256

NUM_SAMPLES = 501  # no multiple of any batch or world size used here


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """501 grey 12 x 12 images; pixel (0, 0) and (0, 1) hold the sample's number, so that a wrong one shows."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_SAMPLES, 12, 12), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(NUM_SAMPLES) // 256, np.arange(NUM_SAMPLES) % 256
    path = tmp_path_factory.mktemp("source") / "numbers.npz"
    np.savez(path, images=images, labels=np.arange(NUM_SAMPLES) % 7)
    return path


@pytest.fixture(scope="session")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """(url, manifest) of the source in 8 shards. Not to be written to."""
    url = str(tmp_path_factory.mktemp("packed") / "set")
    return url, pack(source, url, samples_per_shard=64)


FieldSet = Callable[..., Manifest]


@pytest.fixture(scope="session")
def write_fields() -> FieldSet:
    """Writes a data set of several fields by hand, as `data/reading/manifest.py` describes it, not by the code that
    packs: see `_write_fields`."""
    return _write_fields


def _write_fields(
    url: Path, fields: Sequence[Field], samples: Sequence[Mapping[str, Any]], samples_per_shard: int = 64
) -> Manifest:
    """samples: by field name, of classes and scalars a number, of others (format, bytes of the member)."""
    record = _record(fields)
    members = list(dict.fromkeys(field.member for field in fields if field.kind not in ("class", "scalar")))
    shards, digests, index = [], b"", b""
    (url / "shards").mkdir(parents=True)
    for first in range(0, len(samples), samples_per_shard):
        part = samples[first : first + samples_per_shard]
        records, file = np.zeros(len(part), record), io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, sample in enumerate(part):
                for field in (field for field in fields if field.is_inline):
                    records[f"value:{field.name}"][row] = sample[field.name]
                for column, member in enumerate(members):
                    kind, data = next(
                        sample[field.name] for field in fields if field.member == member and not field.is_inline
                    )
                    entry = tarfile.TarInfo(f"{first + row:06d}.{member}")
                    entry.size = len(data)
                    offset = file.tell() + tarfile.BLOCKSIZE
                    tar.addfile(entry, io.BytesIO(data))
                    for name, value in (
                        ("offset", offset),
                        ("size", len(data)),
                        ("format", FORMATS[kind]),
                        ("digest", digest(data)),
                    ):
                        records[name][row, column] = value
        name, data, rows = f"shards/{first:06d}.tar", file.getvalue(), records.tobytes()
        (url / name).write_bytes(data)
        shards.append(Shard(name, len(part), len(data), hashlib.sha256(data).hexdigest(), records_sha256(rows, record)))
        index, digests = index + rows, digests + chunk_digests(rows, record)
    (url / INDEX).write_bytes(index + digests)
    counts = [shard.num_samples for shard in shards]
    manifest = Manifest(
        version=3, name=url.name, num_samples=len(samples), fields=list(fields), shards=shards,
        index=Index(INDEX, index_bytes(counts, record), hashlib.sha256(index + digests).hexdigest()),
    )  # fmt: skip
    (url / MANIFEST).write_text(manifest.to_json())
    return manifest


def _record(fields: Sequence[Field]) -> np.dtype:
    count = len({field.member for field in fields if field.kind not in ("class", "scalar")})
    types = {"class": "<i4", "bfloat16": "<u2"}
    widths = {"offset": "<u8", "size": "<u4", "format": "u1", "digest": "<u8"}
    columns: list[Any] = [(name, width, (count,)) for name, width in widths.items()]
    for field in fields:
        if field.kind in ("class", "scalar"):
            columns.append((f"value:{field.name}", types.get(field.kind) or types.get(field.dtype) or field.dtype))
    return np.dtype(columns)
