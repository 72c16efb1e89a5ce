"""Folders that their last file makes whole: what was overtaken commits nothing, and lists name no file elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoreray.cluster.verbs.leftovers import clean
from scoreray.data.errors import UserError
from scoreray.data.storage.store import Store, open_store
from scoreray.trainer.checkpoints.unfinished import UNFINISHED, FolderWriter, being_written, read_unfinished

DAY_S = 86400.0


def keys(store: Store) -> set[str]:
    return {key for key, _ in store.list()}


def test_a_folder_is_whole_with_its_last_file_and_has_no_list_then(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("model.json", b"of before")
    with being_written(store, "model.json") as folder:
        assert keys(store) == {"model.json"}  # nothing is written yet
        folder.lists(["a", "b/c"])
        assert keys(store) == {UNFINISHED}
        store.put("a", b"1")
        folder.lists(["d"])
        assert json.loads(store.get(UNFINISHED))["files"] == ["a", "b/c", "d"]
        folder.commit(b"{}")
    assert keys(store) == {"a", "model.json"}


@pytest.mark.parametrize("when", ["before its end", "at its end"])
def test_what_clean_took_for_a_leftover_commits_nothing(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    put, begun = type(store).put, [False]

    def clean_now() -> None:
        assert len(clean(str(tmp_path), DAY_S, remove=True, now=time.time() + 2 * DAY_S).found) == (not begun[0])

    def put_late(self: Store, key: str, data: Any) -> None:
        if key == "model.json":
            begun[0] = True
            store.delete([UNFINISHED])  # as clean does first
        put(self, key, data)

    if when == "at its end":
        monkeypatch.setattr(type(store), "put", put_late)

    def export() -> None:
        with being_written(store, "model.json", ["weights"]) as folder:
            store.put("weights", b"x")
            if when == "before its end":
                clean_now()
                assert keys(store) == set()
            folder.commit(b"{}")

    with pytest.raises(UserError, match=r"by scoreray clean, so no model\.json; give the command again"):
        export()
    assert "model.json" not in keys(store)


def test_an_export_that_goes_on_after_all_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    remove = type(store).delete
    with being_written(store, "model.json", ["weights"]) as folder:
        store.put("weights", b"x")

        def committed_first(self: Store, gone: Any) -> None:
            monkeypatch.undo()
            folder.commit(b"{}")
            remove(self, gone)

        monkeypatch.setattr(type(store), "delete", committed_first)
        assert clean(str(tmp_path), DAY_S, remove=True, now=time.time() + 2 * DAY_S).found == ()
    assert keys(store) == {"weights", "model.json"}


def test_two_at_once_are_one_model_and_one_line(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with being_written(store, "model.json", ["weights"]) as second:
        first = FolderWriter(store, "model.json")
        first.lists(["weights"])
        second.lists(["more"])
        with pytest.raises(UserError, match="another command writes here too"):
            first.commit(b"first")
        second.commit(b"second")
    assert store.get("model.json") == b"second"


@given(
    st.binary() | st.lists(st.text()).map(lambda names: json.dumps({"last": "a", "files": names, "id": ""}).encode())
)
def test_any_bytes_are_no_list_or_one_of_names_in_the_folder(data: bytes) -> None:
    listed = read_unfinished(data)
    assert listed is None or all(
        key.startswith("folder/") and ".." not in key.split("/") for key in listed.keys("folder/")
    )


@pytest.mark.parametrize("last", ["../model.json", "", "/model.json"])
def test_a_last_file_elsewhere_is_none(last: str) -> None:
    assert read_unfinished(json.dumps({"last": last, "files": [], "id": ""}).encode()) is None
