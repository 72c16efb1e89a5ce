"""From a table to a packed data set and back: every field bit for bit, whichever process packs, in runs of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scoreray.data.errors import DataError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.field_options import parse_field_options
from scoreray.data.storage.store import open_store
from scoreray.data.tables import source as module
from scoreray.data.tables.parquet import ArrowTable

N = 60
LATENTS = np.random.default_rng(0).normal(size=(N, 2, 4, 4)).astype(np.float16)


def write(path: Path) -> Path:
    columns = {
        "latent": pa.array(LATENTS.reshape(N, 2, 16).tolist(), pa.list_(pa.list_(pa.float16(), 16), 2)),
        "caption": [f"{i}: " + "é" * (i % 7) for i in range(N)],
        "t5": pa.array([[[float(i), 0.1]] * (i % 3) for i in range(N)], pa.list_(pa.list_(pa.float32()))),
        "label": [i % 4 for i in range(N)],
        "number": np.arange(N),
    }
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


FIELDS = parse_field_options(("x=latent", "caption=caption", "t5=t5", "cls=label", "number=number"))


def test_every_field_of_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    manifest = pack(path, tmp_path / "set", fields=FIELDS, samples_per_shard=16)
    assert [(one.name, one.kind, one.shape, one.dtype) for one in manifest.fields] == [
        ("x", "array", [2, 16], "float16"), ("caption", "text", [16], "uint8"), ("t5", "sequence", [2, 2], "float32"),
        ("cls", "class", [], "int64"), ("number", "scalar", [], "int64"),
    ]  # fmt: skip
    assert manifest.fields[3].class_counts == [15] * 4
    found = SampleReader(str(tmp_path / "set")).read_fields(
        range(N), [FieldRequest(one.name) for one in manifest.fields]
    )
    numbers = found.fields["number"][:, 0].numpy()
    assert sorted(numbers) == list(range(N))
    np.testing.assert_array_equal(found.fields["x"].numpy(), LATENTS.reshape(N, 2, 16)[numbers])
    np.testing.assert_array_equal(found.fields["cls"].numpy(), numbers % 4)
    np.testing.assert_array_equal(found.masks["t5"].sum(1).numpy(), numbers % 3)
    for row, number in enumerate(numbers):
        text = bytes(found.fields["caption"][row][found.masks["caption"][row]].tolist()).decode()
        assert text == f"{number}: " + "é" * (number % 7)


def test_a_large_table_is_packed_run_by_run_and_reads_each_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes by one thread and two; another seed gives another order."""
    path = write(tmp_path / "a.parquet")
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    read, table_read = list[int](), ArrowTable.read

    def counting(self: ArrowTable, columns: object, rows: np.ndarray) -> object:
        read.append(int(np.searchsorted(self.starts, rows[0], "right")))
        return table_read(self, columns, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(ArrowTable, "read", counting)
    sets = {
        name: pack(path, tmp_path / name, fields=FIELDS, samples_per_shard=20, seed=seed, workers=workers, name="same")
        for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1))
    }
    assert [shard.sha256 for shard in sets["a"].shards] == [shard.sha256 for shard in sets["b"].shards]
    assert [shard.sha256 for shard in sets["a"].shards] != [shard.sha256 for shard in sets["c"].shards]
    num_runs = -(-N // 7)
    assert len(read) <= 3 * (num_runs + 3 + num_runs + 16), "of a pack: each run once, shards' ends twice, a first look"
    numbers = SampleReader(str(tmp_path / "a")).read_fields(range(N), [FieldRequest("number")]).fields["number"]
    assert sorted(numbers.flatten().tolist()) == list(range(N))
    assert (np.diff(numbers.flatten() // 7) != 0).sum() == num_runs - 1, "the rows of a run stay together"


def test_bfloat16_that_ml_dtypes_saved_is_kept_bit_for_bit(tmp_path: Path) -> None:
    values = torch.randn(N, 3, 5).bfloat16()
    np.save(tmp_path / "a.npy", values.view(torch.uint16).numpy().view("V2"))
    manifest = pack(tmp_path / "a.npy", tmp_path / "set", fields=parse_field_options(("x=array",)))
    assert (manifest.fields[0].kind, manifest.dtype) == ("array", "bfloat16")
    packed = SampleReader(str(tmp_path / "set")).read(range(N))[0]
    assert packed.dtype == torch.bfloat16
    assert sorted(one.tobytes() for one in packed.view(torch.uint16).numpy()) == sorted(
        one.tobytes() for one in values.view(torch.uint16).numpy()
    )


def test_nan_in_an_array_is_named_by_sample_field_and_index(tmp_path: Path) -> None:
    array = np.zeros((N, 3, 5), np.float32)
    array[:] = np.random.default_rng(0).normal(size=array.shape)
    array[17, 1, 2] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"sample 17: field 'x'.*(1, 2|\[1, 2\])"):
        pack(tmp_path / "a.npy", tmp_path / "set", fields=parse_field_options(("x=array",)))


def test_a_table_in_s3_is_packed_by_ranges(tmp_path: Path, s3_url: str) -> None:
    open_store(s3_url).put("raw/train.parquet", write(tmp_path / "a.parquet"))
    here = pack(tmp_path / "a.parquet", tmp_path / "set", fields=FIELDS, name="same")
    there = pack(f"{s3_url}/raw/train.parquet", f"{s3_url}/set", fields=FIELDS, name="same")
    assert [shard.sha256 for shard in here.shards] == [shard.sha256 for shard in there.shards]
    assert Manifest.at(f"{s3_url}/set").num_samples == N
