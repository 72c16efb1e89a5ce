"""Keys where HTTP is answered: the copy of what the ledger holds, how the ledger is asked, and rows billed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterable

from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.draw import Draw
from scoreray.sampling.service.keys import Entry, Keys
from scoreray.sampling.service.ledger import Claim, LedgerEvent, LedgerLike, Record, Told, Unsynced
from scoreray.sampling.service.request import Drawn, Lost, Origin, SampleRequest

log = logging.getLogger("scoreray.serve")

SYNC_S = 1.0
MANY_BYTES = 4 << 20  # of answers told to the ledger at once


class Keyed:
    """Keys with their runs, the ledger that draws them, and rows billed."""

    def __init__(self, ledger: LedgerLike, limits: Limits) -> None:
        self.keys: Keys[Origin, Draw] = Keys(limits)
        self.bills = Bills()
        self._ledger, self._name = ledger, uuid.uuid4().hex
        self._epoch: str | None = None
        self._syncing = asyncio.Lock()

    async def sync(self) -> None:
        """Tells the ledger what was billed without keys, and all keys where it was started again. Raises Lost."""
        async with self._syncing:
            told = await self._ledger.sync(self._name, dict(self.bills.own))
            if told.epoch != self._epoch:
                if self._epoch is not None:
                    log.warning("the ledger was started again: telling it %d keys", len(self.keys))
                for records in self._records():
                    await self._ledger.restore(records, self.bills.keyed)
                self._epoch = told.epoch
            self.bills.tell(told)

    async def follow(self) -> None:
        """Syncs again and again, so that a ledger that was started again knows the keys soon."""
        while True:
            with contextlib.suppress(Lost, TimeoutError):
                await self.sync()
            await asyncio.sleep(SYNC_S)

    async def events(
        self, entry: Entry[Origin, Draw], request: SampleRequest, instead_of: Origin | None
    ) -> AsyncGenerator[LedgerEvent, None]:
        """The events of a request with a key, as of `Ledger.draw`. Raises Refused when the ledger is lost."""
        try:
            while True:
                if self._epoch is None:
                    await self.sync()
                claim = Claim(entry.token, entry.key, entry.fingerprint, entry.origin, self._epoch, instead_of)
                async with contextlib.aclosing(self._ledger.draw(claim, request)) as events:
                    async for event in events:
                        if isinstance(event, Unsynced):
                            break
                        if isinstance(event, Drawn):
                            self.bills.keyed[entry.token] = max(self.bills.keyed.get(entry.token, 0), event.billed)
                        yield event
                    else:
                        return
                await self.sync()
        except Lost as error:
            message = f"the ledger of keys was lost ({error}), and nothing was billed: ask again with the same key"
            raise Refused("ledger_lost", message, retry_after_s=2) from None

    def _records(self) -> Iterable[list[Record]]:
        """All keys, some MANY_BYTES of answers at a time; one list at least."""
        records, num_bytes = list[Record](), 0
        for entry in self.keys:
            answer = entry.run.known_answer() if entry.run is not None else None
            done = answer.as_event() if answer is not None else None
            record = Record(
                entry.token, entry.key, entry.fingerprint, entry.origin, self.keys.age_s(entry), entry.billed, done
            )
            records.append(record)
            num_bytes += 1024 + entry.num_bytes
            if num_bytes > MANY_BYTES:
                yield records
                records, num_bytes = [], 0
        yield records


class Bills:
    """Rows billed by token, as the one who answers HTTP counts them: never twice, and never backwards.

    own: of requests without a key, counted here. keyed: of those with one, which the ledger counts. others: of other
    askers, such as the process whose place this one took.
    """

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.keyed: dict[str, int] = {}
        self.others: dict[str, int] = {}
        self._shown: Counter[str] = Counter()

    def tell(self, told: Told) -> None:
        for mine, theirs in ((self.keyed, told.keyed), (self.others, told.others)):
            for token, rows in theirs.items():
                mine[token] = max(mine.get(token, 0), rows)

    def more(self) -> Iterable[tuple[str, int]]:
        """(token, rows) by which the counters have grown since this was last asked."""
        for token in {*self.own, *self.keyed, *self.others}:
            total = self.own[token] + self.keyed.get(token, 0) + self.others.get(token, 0)
            if total > self._shown[token]:
                yield token, total - self._shown[token]
                self._shown[token] = total
