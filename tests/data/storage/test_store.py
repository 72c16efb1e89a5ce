"""Objects by key: the same behaviour on a folder and on a real S3 server, and errors that say what to do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from obstore.store import MemoryStore

import scoreray.data.storage.s3 as store_s3
from scoreray.data.errors import StorageError, UserError
from scoreray.data.storage import clouds, retries
from scoreray.data.storage.interface import NotAFile
from scoreray.data.storage.store import NotFound, PathStore, Store, open_store


@pytest.fixture(params=["path", "s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """gs: obstore's store in memory instead of the cloud's."""
    if request.param == "gs":
        memory = MemoryStore()
        monkeypatch.setattr(clouds, "_bucket", lru_cache(lambda root, environment: memory))
        return open_store("gs://bucket/some/prefix")
    return open_store(tmp_path / "store" if request.param == "path" else request.getfixturevalue("s3_url"))


def test_an_object_is_read_back_whole_and_in_ranges_as_slices(store: Store) -> None:
    data = bytes(range(200))
    store.put("a/b.bin", data)
    assert store.get("a/b.bin") == data
    for start, end in [(0, 5), (7, 9), (150, 500), (None, 3), (190, None), (5, 5), (300, 310), (0, 0)]:
        assert store.get("a/b.bin", start, end) == data[start:end]
    assert store.size("a/b.bin") == 200
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")
    assert not store.exists("a")


def test_a_missing_key_is_not_found_by_its_url(store: Store) -> None:
    for call in (store.get, store.size):
        with pytest.raises(NotFound, match=r"no/where\.bin: no such"):
            call("no/where.bin")
    store.delete(["no/where.bin"])
    assert store.list() == []


def test_list_takes_a_string_prefix_and_is_sorted(store: Store) -> None:
    for key in ("b/2", "b/10", "a", "bc", "b/sub/1"):
        store.put(key, key.encode())
    assert store.list() == [("a", 1), ("b/10", 4), ("b/2", 3), ("b/sub/1", 7), ("bc", 2)]
    assert store.list("b/") == [("b/10", 4), ("b/2", 3), ("b/sub/1", 7)]
    assert store.child("b").list("su") == [("sub/1", 7)]
    store.delete(["b/sub/1", "b/2", "gone"])
    assert [key for key, _ in store.list("b")] == ["b/10", "bc"]


def test_a_file_url_is_the_path_that_it_names(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/a", f"FILE://localhost{tmp_path}/a", (tmp_path / "a").as_uri()):
        assert open_store(url) == open_store(tmp_path / "a")
    assert open_store("file:///a%20b/%23?c#d").root == "/a b/#?c#d"
    for url in ("file://elsewhere/a", "file://a", "file:///", "file://", "file:/a", "http://a/b", "file:///a%00b"):
        if url == "file:///":
            assert open_store(url).root == "/"
            continue
        with pytest.raises(UserError, match=r"accepted: s3://BUCKET/PREFIX, gs://.*file:///PATH or a path"):
            open_store(url)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for call in (lambda store: store.get("pipe"), lambda store: store.get("pipe", 0, 10)):
        with pytest.raises(NotAFile, match="pipe: is a FIFO, no file"):
            call(open_store(tmp_path))
    open_store(tmp_path).advise("pipe", 0, 10)


def test_put_new_lets_exactly_one_of_many_writers_win(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_new("lock", str(i).encode()), range(8)))
    assert sum(won) == 1
    assert store.get("lock") == str(won.index(True)).encode()


def test_a_file_is_uploaded_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_s3, "MULTIPART_BYTES", 20 << 20)  # parts are a quarter, S3 wants 5 MiB and more
    file = tmp_path / "large"
    file.write_bytes(os.urandom(1 << 20) * 21)
    store.put("large", file)
    assert store.get("large") == file.read_bytes()


def _child_reads(data: bytes) -> bool:
    return pickle.loads(data).get("key") == b"value"


def test_a_store_is_its_url_and_works_in_a_forked_process(store: Store) -> None:
    store.put("key", b"value")
    assert pickle.loads(pickle.dumps(store)) == store == open_store(store.url())
    if store.url().startswith("gs:"):
        pytest.skip("refused in one line: test_clouds.py")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_child_reads, (pickle.dumps(store),))


def test_a_folder_that_was_not_there_is_not_there_after_it_was_tried(tmp_path: Path) -> None:
    open_store(str(tmp_path / "mistyped" / "runs")).check_writable()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_can_not_be_made_is_reported_as_such() -> None:
    with pytest.raises(StorageError, match=r"^/proc/x1: can't be written: no folder can be made here$"):
        open_store("/proc/x1").check_writable()


def test_check_writable_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert store.list() == []


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", ".", "a/./b", "a\0b"])
def test_a_key_never_leaves_the_root(key: str, tmp_path: Path) -> None:
    for store in (open_store(tmp_path), open_store("s3://bucket/prefix")):
        for use in (store.get, store.size, lambda key, store=store: store.put(key, b""), store.child):
            with pytest.raises(StorageError, match=r"can't be the key"):
                use(key)


@pytest.mark.parametrize(
    "url", ["gs://b/x", "az://b/x", "http://x/y", "pipe:cat x", "s3://", "s3://A_B/x", "s3://ab", ""]
)
def test_a_url_that_can_not_be_opened_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match=r"accepted|can't be a bucket"):
        open_store(url)


def test_a_write_that_fails_leaves_the_earlier_object_and_names_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.put("key", b"earlier")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match=r"key: no space left on this disk"):
        store.put("key", b"later")
    assert store.get("key") == b"earlier"
    assert os.listdir(tmp_path) == ["key"]


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file was expected|folder was expected|exists"):
        PathStore(str(tmp_path / "file")).put("key", b"")


def test_a_missing_bucket_is_named_by_every_call(local_s3: object) -> None:
    store = open_store("s3://no-such-bucket/x")
    for call in (lambda: store.get("k"), lambda: store.size("k"), lambda: store.put("k", b""), store.list):
        with pytest.raises(StorageError, match=r"bucket 'no-such-bucket' does not exist at http"):
            call()


def test_wrong_and_absent_credentials_are_different_errors(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"credentials refused.*AWS_SECRET_ACCESS_KEY"):
        open_store(s3_url).check_writable()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StorageError, match=r"no credentials found; set AWS_ACCESS_KEY_ID"):
        open_store(s3_url).check_writable()


def test_an_endpoint_that_does_not_answer_is_named(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match="is not reachable"):
        open_store(s3_url).check_writable()
    assert time.monotonic() - started < 20, "somebody waits for this check"
    monkeypatch.setattr(retries, "PATIENCE_S", 0.1)
    with pytest.raises(StorageError, match=r"the endpoint http://127.0.0.1:9 is not reachable; check AWS_ENDPOINT_URL"):
        open_store(s3_url).get("key")


@pytest.mark.parametrize("new", [True, False])
def test_a_write_whose_temporary_file_another_start_clears_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    store = open_store(tmp_path)
    sync, cleared = os.fsync, 0

    def cleared_away(descriptor: int) -> None:
        nonlocal cleared
        sync(descriptor)
        if cleared < 3:
            cleared += 1
            store.clear_unfinished("metrics/", but="\0")

    monkeypatch.setattr(os, "fsync", cleared_away)
    if new:
        assert store.put_new("metrics/100.jsonl", b"records")
        assert not store.put_new("metrics/100.jsonl", b"others")
    else:
        store.put("metrics/100.jsonl", b"records")
    assert cleared == 3
    assert store.get("metrics/100.jsonl") == b"records"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["100.jsonl"]
