"""Google's and Azure's stores: errors in one line, prefixes, forks; `test_store.py` has what all stores share."""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.store import AzureStore, GCSStore, MemoryStore
from PIL import Image
from waiting import PATIENCE_S

from scoreray.data.errors import StorageError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.stream import Stream
from scoreray.data.sources.field_options import parse_field_options
from scoreray.data.storage import clouds, retries
from scoreray.data.storage.retries import Refusal
from scoreray.data.storage.store import NotFound, open_store

REFUSED = """Generic GCS error: Error performing GET http://x/b/k in 1ms - Server returned non-2xx status code: {}: {}

Debug source:
Generic {{ store: "GCS" }}"""


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = MemoryStore()
    monkeypatch.setattr(clouds, "_bucket", lru_cache(lambda root, environment: bucket))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    """Nobody listens there."""
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "somebody")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    monkeypatch.setattr(retries, "PATIENCE_S", 0.1)
    return "http://127.0.0.1:9"


def test_the_scheme_chooses_the_cloud(endpoint: str) -> None:
    assert isinstance(clouds._bucket("gs://bucket/prefix", clouds._environment()), GCSStore)
    assert isinstance(clouds._bucket("az://bucket/prefix", clouds._environment()), AzureStore)
    assert open_store("az://bucket/a//b/").root == "az://bucket/a/b"


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_cloud_out_of_reach_is_one_line(scheme: str, endpoint: str) -> None:
    for use in ("list", "check_reachable", "check_writable"):
        with pytest.raises(StorageError, match=rf"^{scheme}://bucket/x.*the endpoint {endpoint} is not reachable"):
            getattr(open_store(f"{scheme}://bucket/x"), use)()


def test_a_machine_without_credentials_is_one_line() -> None:
    error = clouds.BaseError("Generic GCS error: Error performing token request: Error performing GET http://169.2 ...")
    explained = clouds.explain("gs://bucket/key", "Google Cloud Storage", clouds.SETTINGS["gs"], error)
    assert "no usable credentials found for Google Cloud Storage; set GOOGLE_APPLICATION_CRED" in str(explained)


@pytest.mark.parametrize(
    ("status", "body", "refusal"),
    [
        ("503 Slow Down", "<Error><Code>SlowDown</Code><Message>wait</Message></Error>",
         Refusal("503", "SlowDown", "wait")),
        ("404 Not Found", "", Refusal("404", "404")),
        ("400 Bad Request", "no XML at all", Refusal("400", "", "no XML at all")),
        ("403 Forbidden", "\ufeff<?xml version='1.0'?><Error><Code>AuthenticationFailed</Code></Error>",
         Refusal("403", "AuthenticationFailed", "")),
    ],
)  # fmt: skip
def test_a_refusal_is_read_from_obstores_message(status: str, body: str, refusal: Refusal) -> None:
    assert clouds.refusal_of(clouds.BaseError(REFUSED.format(status, body))) == refusal
    assert clouds.refusal_of(clouds.BaseError("Generic GCS error: HTTP error: error sending request")) is None


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        ("404", "ContainerNotFound", "bucket 'bucket' does not exist at Azure; create it or fix the URL"),
        ("404", "BlobNotFound", "no such object"),
        ("403", "AuthenticationFailed", "credentials refused (AuthenticationFailed) at Azure; check AZURE_STORAGE_ACC"),
        ("503", "ServerBusy", "Azure is busy (ServerBusy)"),
    ],
)
def test_azures_codes_are_the_same_lines_as_s3s(status: str, code: str, line: str) -> None:
    error = clouds.BaseError(REFUSED.format(f"{status} X", f"<Error><Code>{code}</Code></Error>"))
    explained = clouds.explain("az://bucket/key", "Azure", clouds.SETTINGS["az"], error)
    assert str(explained).startswith(f"az://bucket/key: {line}")
    assert isinstance(explained, NotFound) == (code == "BlobNotFound")


def test_a_prefix_is_the_beginning_of_a_key_and_stamps_change(memory: None) -> None:
    store = open_store("gs://bucket")
    for key in ("b/2", "bc", "b"):
        store.put(key, key.encode())
    assert [key for key, _ in store.list("b")] == ["b", "b/2", "bc"]
    before = store.stamps()
    store.put("bc", b"other")
    assert {key for key, stamp in store.stamps().items() if stamp != before[key]} == {"bc"}


def test_a_data_set_is_packed_to_a_cloud_and_streamed_from_it(memory: None, source: Path) -> None:
    manifest = pack(str(source), "gs://bucket/set", samples_per_shard=100)
    assert Manifest.load(open_store("gs://bucket/set")) == manifest
    with Stream("gs://bucket/set", global_batch_size=24, rank=0, world_size=1, seed=0, cache_bytes=0) as stream:
        batch = next(stream)
    numbers = batch.images[:, 0, 0, 0].long() * 256 + batch.images[:, 0, 0, 1].long()
    assert (numbers % 7 == batch.labels).all()


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_tables_of_a_cloud_are_packed_by_ranges(scheme: str, memory: None, tmp_path: Path) -> None:
    """A parquet file, an .npy and a folder with metadata make the bytes that local ones make."""
    rng, bucket, files = np.random.default_rng(0), open_store(f"{scheme}://bucket"), tmp_path / "files"
    (files / "photos").mkdir(parents=True)
    rows = [{"x": rng.normal(size=4).tolist(), "y": i % 3, "text": f"n {i}"} for i in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), files / "rows.parquet", row_group_size=20)
    np.save(files / "x.npy", rng.normal(size=(50, 2, 3)).astype(np.float16))
    about = [{"file_name": f"{i}.png", "text": f"n {i}"} for i in range(5)]
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(files / "photos" / f"{i}.png")
    (files / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, about)))
    for path in files.rglob("*.*"):
        bucket.put(path.relative_to(files).as_posix(), path.read_bytes())
    for name, fields in (("rows.parquet", ["x=x", "label=y", "text=text"]), ("x.npy", []), ("photos", ["text=text"])):
        asked = parse_field_options(fields)
        made = pack(f"{scheme}://bucket/{name}", f"{scheme}://bucket/{name}-set", fields=asked, name="set")
        same = pack(files / name, tmp_path / f"{name}-set", fields=asked, name="set")
        assert [shard.sha256 for shard in made.shards] == [shard.sha256 for shard in same.shards]
        assert made.fields == same.fields
        assert verify(f"{scheme}://bucket/{name}-set") == []


def test_a_fork_is_refused_in_one_line(memory: None) -> None:
    """In a fork of a process that has used obstore its calls never return."""
    store = open_store("gs://bucket")
    store.put("key", b"value")
    child = os.fork()
    if child == 0:
        try:
            store.get("key")
        except StorageError as error:
            os._exit(0 if "start processes by spawn" in str(error) else 2)
        os._exit(1)
    deadline = time.monotonic() + PATIENCE_S
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done == (child, 0)
