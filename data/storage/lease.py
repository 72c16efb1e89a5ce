"""A lease on a place in the store: of several starts of one job the newest works there, and older ones end.

A start takes the lease by writing its token, without waiting for an older start, which may hang. The older one finds
another token, and ends. The store has no transaction around a check and what follows it, so a holder
checks right before what must not be done twice, and once more after it.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from scoreray.data.errors import DataError, Unanswered, UserError
from scoreray.data.storage.interface import NotFound, Store


class TakenOver(UserError):
    """A newer start of the same job is at work at this place, or has finished it."""


class LeaseRemoved(DataError):
    """The lease is nobody's any more: the place was removed, or cleared."""


@dataclass
class Lease:
    """A start's claim to a place. `what`: the job, as messages call it ("run"). Can be pickled."""

    store: Store
    key: str
    what: str
    token: str
    _checked_at: float = field(default=0.0, repr=False, compare=False)

    @staticmethod
    def take(store: Store, key: str, what: str, token: str = "") -> Lease:
        """Make the place this start's, whichever start had it before."""
        token = token or uuid.uuid4().hex
        store.put(key, token.encode())
        return Lease(store, key, what, token)

    def holder(self) -> str:
        """The token of the newest start; empty where there is none."""
        try:
            return self.store.get(self.key).decode(errors="replace")
        except NotFound:
            return ""

    def check(self) -> None:
        """Raises TakenOver where a newer start holds the lease, LeaseRemoved where nobody does; StorageError."""
        holder = self.holder()
        if not holder:
            raise LeaseRemoved(
                f"{self.store.url(self.key)}: was removed, alone or with the folder around it, while this {self.what} "
                "went on, so it ends; see what removes files there, then give the same command: it goes on from what "
                "is left"
            )
        if holder != self.token:
            raise TakenOver(
                f"{self.store.url()}: another start of this {self.what} ({holder[:8]}) has taken over from this one "
                f"({self.token[:8]}), which ends without changing anything more"
            )

    def check_every(self, seconds: float) -> None:
        """`check`, where the last one is so long ago; a store that does not answer is tried again at the next call."""
        now = time.monotonic()
        if 0 <= now - self._checked_at < seconds:
            return
        self._checked_at = now
        try:
            self.check()
        except Unanswered:
            return
