"""Where idempotency keys are stored: which request came with each, what answered it, and the rows billed.

One interface over an embedded store: SQLite for the processes of one machine, Redis (`key_store_redis.py`) for those of
a cluster. A store outlives the processes that use it, so the death of an ingress or of a replica forgets nothing.
Without torch and without Ray. All methods block, for well under a millisecond: call them from a thread.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.request import Claim, Completed, Origin

LEASE_S = 6.0
"""How long a draw is thought to go on after its owner or replica last said so (each third of this)."""
OVERHEAD_BYTES = 1024  # of an answer, beside its body
BUSY_S = 10.0  # a transaction of another process takes milliseconds; this one has stopped


class StoreLost(Exception):
    """The store can't be reached. A method that raised this may or may not have had its effect; all may be repeated."""


@dataclass(frozen=True)
class KeyEntry:
    """What is stored of a key. origin: what its samples are made from, whichever request brings it again.

    answer: once it was drawn, until it is let go. mine: without an answer, whether this claim may draw.
    """

    origin: Origin
    mine: bool = True
    answer: Completed | None = None


class KeyStore(Protocol):
    """Keys for `remember_s` each, at most `remember_keys` of them and `remember_bytes` of their answers.

    Beyond these the oldest go first. Where only an answer was let go the key's origin stays, its checkpoint and seed:
    drawn again, it gets the same samples, and is not billed again. Every method raises StoreLost.
    """

    def begin(self, claim: Claim, origin: Origin, instead_of: Origin | None = None) -> KeyEntry:
        """The entry of a key, a new one of `origin` where it is not known, leased to its owner if no one draws it.

        instead_of: the stored origin that `origin` replaces, where its checkpoint was removed from the run's storage.
        Raises Refused (key_reused) where the key came with another request.
        """
        ...

    def renew(self, claim: Claim) -> None:
        """Says that the draw of a claim goes on."""
        ...

    def finish(self, claim: Claim, answer: Completed, num_rows: int) -> Completed:
        """Stores a key's answer and bills its rows, both once; the first answer where two were drawn."""
        ...

    def bill(self, source: str, num_rows: Mapping[str, int]) -> dict[str, int]:
        """Sets what `source` has billed without keys so far, by token; all rows billed, by token."""
        ...

    def close(self) -> None: ...


def key_reused() -> Refused:
    message = "this idempotency key came with another request before, or another Accept: use a new key for each"
    return Refused("key_reused", message)


def facts(answer: Completed) -> str:
    """What is stored of an answer beside its body, as JSON."""
    found = [answer.precision, answer.queued_s, answer.took_s, answer.acceptance, answer.rows]
    return json.dumps([*found, True] if answer.parallel else found)  # an older version takes five


SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT, key TEXT, fingerprint TEXT, origin TEXT,
    begun REAL, owner TEXT, lease REAL, billed INTEGER DEFAULT 0, num_bytes INTEGER DEFAULT 0, facts TEXT, body BLOB,
    UNIQUE (token, key)
);
CREATE INDEX IF NOT EXISTS begun ON keys (begun);
CREATE INDEX IF NOT EXISTS answered ON keys (id, num_bytes) WHERE num_bytes > 0;
CREATE TABLE IF NOT EXISTS billed (token TEXT, source TEXT, num_rows INTEGER, PRIMARY KEY (token, source));
"""


class SQLiteKeyStore:
    """A file that processes of one machine share. A SIGKILL between two writes, or in one, leaves the last whole state.

    In WAL mode with synchronous=NORMAL a commit is in the system's page cache and not yet on disk: it outlives every
    process, and no fsync is waited for. The file itself goes with the service's scratch folder, so a power cut, which
    may take the last commits, takes all of them.
    """

    def __init__(self, path: str | Path, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._limits, self._clock, self._lock = limits, clock, threading.Lock()
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)

    def begin(self, claim: Claim, origin: Origin, instead_of: Origin | None = None) -> KeyEntry:
        now, limits = self._clock(), self._limits
        with self._transaction() as db:
            db.execute("DELETE FROM keys WHERE begun < ?", (now - limits.remember_s,))
            select = "SELECT fingerprint, origin, owner, lease, facts, body FROM keys WHERE token = ? AND key = ?"
            row = db.execute(select, (claim.token, claim.key)).fetchone()
            if row is None:
                values = (*claim, json.dumps(origin), now, now + LEASE_S)
                inserted = db.execute(
                    "INSERT INTO keys (token, key, fingerprint, owner, origin, begun, lease) VALUES (?,?,?,?,?,?,?)",
                    values,
                )
                db.execute("DELETE FROM keys WHERE id <= ?", ((inserted.lastrowid or 0) - limits.remember_keys,))
                return KeyEntry(origin)
            fingerprint, stored, owner, lease, about, body = row
            known = Origin(*json.loads(stored))
            if fingerprint != claim.fingerprint:
                raise key_reused()
            if body is not None:
                return KeyEntry(known, answer=Completed(body, *json.loads(about)))
            if owner != claim.owner and lease > now:
                return KeyEntry(known, mine=False)
            made_from = origin if instead_of == known else known
            db.execute(
                "UPDATE keys SET owner = ?, lease = ?, origin = ? WHERE token = ? AND key = ?",
                (claim.owner, now + LEASE_S, json.dumps(made_from), claim.token, claim.key),
            )
            return KeyEntry(made_from)

    def renew(self, claim: Claim) -> None:
        values = (self._clock() + LEASE_S, claim.token, claim.key, claim.owner)
        with self._transaction() as db:
            db.execute("UPDATE keys SET lease = ? WHERE token = ? AND key = ? AND owner = ?", values)

    def finish(self, claim: Claim, answer: Completed, num_rows: int) -> Completed:
        with self._transaction() as db:
            select = "SELECT id, billed, facts, body FROM keys WHERE token = ? AND key = ?"
            number, billed, about, body = db.execute(select, (claim.token, claim.key)).fetchone() or (None, 0, "", None)
            if body is not None:
                return Completed(body, *json.loads(about))
            if not billed:
                more = "ON CONFLICT DO UPDATE SET num_rows = num_rows + excluded.num_rows"
                db.execute(f"INSERT INTO billed VALUES (?, '', ?) {more}", (claim.token, num_rows))
            update = "UPDATE keys SET billed = 1, lease = 0, facts = ?, body = ?, num_bytes = ? WHERE id = ?"
            db.execute(update, (facts(answer), answer.body, len(answer.body) + OVERHEAD_BYTES, number))
            self._let_answers_go(db)
        return answer

    def bill(self, source: str, num_rows: Mapping[str, int]) -> dict[str, int]:
        add = "INSERT INTO billed VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET num_rows = excluded.num_rows"
        with self._transaction() as db:
            db.executemany(add, [(token, source, rows) for token, rows in num_rows.items()])
            return dict(db.execute("SELECT token, sum(num_rows) FROM billed GROUP BY token").fetchall())

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _let_answers_go(self, db: sqlite3.Connection) -> None:
        """Forgets the oldest answers until the others fit into `remember_bytes`."""
        (total,) = db.execute("SELECT total(num_bytes) FROM keys WHERE num_bytes > 0").fetchone()
        oldest_first = db.execute("SELECT id, num_bytes FROM keys WHERE num_bytes > 0 ORDER BY id")
        gone = []
        while total > self._limits.remember_bytes:
            number, num_bytes = oldest_first.fetchone()
            gone.append((number,))
            total -= num_bytes
        oldest_first.close()
        db.executemany("UPDATE keys SET num_bytes = 0, facts = NULL, body = NULL WHERE id = ?", gone)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One that other processes see whole or not at all. Raises StoreLost."""
        with self._lock:
            try:
                with self._db:  # commits, or rolls back where an exception leaves it
                    self._db.execute("BEGIN IMMEDIATE")
                    yield self._db
            except sqlite3.Error as error:
                raise StoreLost(f"SQLite: {error}") from error
