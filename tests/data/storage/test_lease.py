"""A place is the newest start's; an older one finds out, and so does one whose place was removed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from scoreray.data.errors import Unanswered
from scoreray.data.storage.lease import Lease, LeaseRemoved, TakenOver
from scoreray.data.storage.store import PathStore, open_store


def test_the_newest_start_owns_the_place(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, second = Lease.take(store, "owner", "study"), Lease.take(store, "owner", "study", "mine")
    second.check()
    pickle.loads(pickle.dumps(second)).check()
    with pytest.raises(TakenOver, match=r"another start of this study \(mine\) has taken over from this one"):
        first.check()
    assert first.holder() == "mine"
    store.delete(["owner"])
    assert first.holder() == ""
    for lease in (first, second):
        with pytest.raises(LeaseRemoved, match=rf"{tmp_path}/owner: was removed.*while this study went on"):
            lease.check()


def test_ownership_is_checked_at_intervals_and_a_store_may_be_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.take(open_store(tmp_path), "owner", "run")
    requested: list[str] = []

    def away(self: PathStore, key: str, *at: int) -> bytes:
        requested.append(key)
        raise Unanswered("busy")

    monkeypatch.setattr(PathStore, "get", away)
    for _ in range(5):
        lease.check_every(1000)
    assert requested == ["owner"]
    lease.check_every(0)
    assert len(requested) == 2
    with pytest.raises(Unanswered):
        lease.check()
