"""The ledger of keys: a draw goes on when the one who asked dies, and whichever side dies is told by the other."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest

from scoreray.sampling.service.body import SampleBody
from scoreray.sampling.service.config import Limits, Refused, ServeConfig
from scoreray.sampling.service.draw import SampleAnswer
from scoreray.sampling.service.keyed import Bills, Keyed
from scoreray.sampling.service.ledger import Claim, Ledger, LedgerEvent, Record, Told
from scoreray.sampling.service.request import Accepted, Drawn, Event, Lost, Origin, SampleRequest
from scoreray.sampling.service.service import Service


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "kept"))


class Drawer:
    """Replicas that draw nothing: an answer says how many draws have ended. `go` lets them end."""

    def __init__(self) -> None:
        self.begun = self.ended = self.given_up = 0
        self.go = asyncio.Event()

    async def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        self.begun += 1
        yield Accepted()
        try:
            await self.go.wait()
        except BaseException:
            self.given_up += 1
            raise
        self.ended += 1
        body = f"{self.ended} {request.origin.checkpoint} {request.seeds[0]}".encode()
        yield Drawn(body, "fp32", 0.0, 0.0)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        pass

    async def metrics(self) -> dict[str, str]:
        return {}


class Wire:
    """A ledger in another process: `cut` breaks every call that is under way, `down` lets none through."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.cut, self.down = ledger, asyncio.Event(), False

    async def _through(self, coroutine: Any) -> Any:
        if self.down:
            coroutine.close()
            raise Lost("down")
        call, cut = asyncio.ensure_future(coroutine), asyncio.ensure_future(self.cut.wait())
        try:
            await asyncio.wait({call, cut}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            raise
        finally:
            cut.cancel()
        if not call.done():
            raise Lost("cut")
        return call.result()

    async def draw(self, claim: Claim, request: SampleRequest) -> AsyncGenerator[LedgerEvent, None]:
        events = self.ledger.draw(claim, request)
        try:
            while (event := await self._through(_next(events))) is not None:
                yield event
        finally:
            if not self.cut.is_set():  # a process that dies cancels nothing
                await events.aclose()

    async def sync(self, asker: str, own: dict[str, int]) -> Told:
        return await self._through(self.ledger.sync(asker, own))

    async def restore(self, records: list[Record], keyed: dict[str, int]) -> None:
        await self._through(self.ledger.restore(records, keyed))


async def _next(events: AsyncGenerator[LedgerEvent, None]) -> LedgerEvent | None:
    return await anext(events, None)


@contextlib.asynccontextmanager
async def ingress(run_url: str, drawer: Drawer, wire: Wire, limits: Limits | None = None) -> AsyncIterator[Service]:
    config = ServeConfig((("kept", run_url),), limits=limits or Limits())
    service = Service(config, drawer, ledger=wire)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def ask(service: Service, key: str | None = "k", **fields: Any) -> SampleAnswer:
    run = await service.submit(SampleBody(steps=3, **fields), token="ana", key=key, media="application/json")
    try:
        return await run.answer()
    finally:
        service.leave(run)


async def billed(service: Service) -> int:
    page = await service.metrics()
    lines = [line for line in page.splitlines() if line.startswith("scoreray_billed_rows_total{")]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


def test_an_answer_outlives_the_one_who_asked_and_is_billed_once(run_url: str) -> None:
    async def main() -> None:
        drawer = Drawer()
        ledger = Ledger(Limits(), drawer)
        async with ingress(run_url, drawer, Wire(ledger)) as first:
            drawer.go.set()
            await ask(first, None, count=3)
            before = await ask(first, count=2)
            assert await billed(first) == 5
        async with ingress(run_url, drawer, Wire(ledger)) as second:
            assert await billed(second) == 5  # the counter does not begin again
            again = await ask(second, count=2)
            assert again.body == before.body
            assert {**again.about} == {**before.about}
            assert (drawer.ended, await billed(second)) == (2, 5)
            with pytest.raises(Refused, match="another request"):
                await ask(second, count=4)
            await ask(second, "other", count=1)
            assert await billed(second) == 6

    asyncio.run(main())


def test_a_draw_goes_on_when_the_one_who_asked_dies_and_a_retry_joins_it(run_url: str) -> None:
    async def main() -> None:
        drawer = Drawer()
        ledger = Ledger(Limits(), drawer)
        wire = Wire(ledger)
        async with ingress(run_url, drawer, wire) as first:
            lost = asyncio.create_task(ask(first, count=2))
            await until(lambda: drawer.begun == 1)
            wire.cut.set()
            with pytest.raises(Refused, match="again with the same key"):
                await lost
        async with ingress(run_url, drawer, Wire(ledger)) as second:
            joined = asyncio.create_task(ask(second, count=2))
            await asyncio.sleep(0.05)
            drawer.go.set()
            assert (await joined).body.startswith(b"1 ")
            assert (drawer.begun, drawer.ended, drawer.given_up, await billed(second)) == (1, 1, 0, 2)

    asyncio.run(main())


def test_a_client_that_goes_gives_its_draw_up_in_the_ledger_too(run_url: str) -> None:
    async def main() -> None:
        drawer = Drawer()
        async with ingress(run_url, drawer, Wire(Ledger(Limits(), drawer))) as service:
            gone = asyncio.create_task(ask(service))
            await until(lambda: drawer.begun == 1)
            gone.cancel()
            await until(lambda: drawer.given_up == 1)
            drawer.go.set()
            assert (await ask(service)).body.startswith(b"1 ")
            assert await billed(service) == 1

    asyncio.run(main())


def test_a_ledger_that_was_started_again_is_told_every_key_before_the_next(run_url: str) -> None:
    async def main() -> None:
        drawer = Drawer()
        wire = Wire(Ledger(Limits(), drawer))
        drawer.go.set()
        async with ingress(run_url, drawer, wire) as service:
            first = await ask(service, "a", count=2)
            await ask(service, None, count=3)
            wire.ledger = Ledger(Limits(), drawer)  # its memory is gone
            await ask(service, "b")
            assert await billed(service) == 6
        async with ingress(run_url, drawer, Wire(wire.ledger)) as second:
            assert (await ask(second, "a", count=2)).body == first.body
            assert (drawer.ended, await billed(second)) == (3, 6)

    asyncio.run(main())


def test_without_its_ledger_a_key_is_refused_and_a_request_without_one_is_drawn(run_url: str) -> None:
    async def main() -> None:
        drawer = Drawer()
        wire = Wire(Ledger(Limits(), drawer))
        async with ingress(run_url, drawer, wire) as service:
            drawer.go.set()
            before = await ask(service, "known")
            wire.down = True
            with pytest.raises(Refused) as refused:
                await ask(service, "new")
            assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("ledger_lost", 503, "2")
            assert drawer.ended == 1
            assert (await ask(service, "known")).body == before.body
            assert (await ask(service, None)).body.startswith(b"2 ")
            wire.down = False
            assert (await ask(service, "new")).body.startswith(b"3 ")

    asyncio.run(main())


def test_what_the_ledger_holds_is_bounded_in_number_and_bytes(run_url: str) -> None:
    limits = Limits(remember_keys=5, remember_bytes=9_000)

    async def main() -> None:
        drawer = Drawer()
        ledger = Ledger(limits, drawer)
        drawer.go.set()
        async with ingress(run_url, drawer, Wire(ledger), limits) as service:
            for i in range(20):
                await ask(service, f"{i}")
            assert len(ledger._keys) == 5
            assert ledger._keys.num_bytes <= 9_000
        async with ingress(run_url, drawer, Wire(ledger), limits) as second:
            await ask(second, "15")  # drawn again, as its answer was let go, and not billed again
            assert (drawer.ended, await billed(second)) == (21, 20)

    asyncio.run(main())


def test_a_retry_is_made_from_what_its_key_was_made_from(run_url: str, new_run: Callable[..., str]) -> None:
    """A newer checkpoint came between, and the answer was let go: checkpoint and seed are the first draw's."""

    async def main() -> None:
        drawer = Drawer()
        drawer.go.set()
        ledger = Ledger(Limits(remember_bytes=1), drawer)
        async with ingress(run_url, drawer, Wire(ledger)) as first:
            before = (await ask(first)).about
        new_run(run_url, 128)
        async with ingress(run_url, drawer, Wire(ledger)) as second:
            assert (await ask(second, "new")).about["images_seen"] == 128
            again = (await ask(second)).about
            assert again == before
            assert again["images_seen"] == 64

    asyncio.run(main())


def test_counters_never_go_backwards_nor_count_twice() -> None:
    bills = Bills()
    bills.own["a"] += 2
    bills.keyed["a"] = 3
    assert list(bills.more()) == [("a", 5)]
    bills.tell(Told("e", {"a": 3}, {"a": 7, "b": 1}))
    assert sorted(bills.more()) == [("a", 7), ("b", 1)]
    bills.tell(Told("other", {}, {}))
    assert list(bills.more()) == []


def test_keys_are_told_in_pieces() -> None:
    class Told_(Ledger):
        sizes: list[int] = []  # noqa: RUF012

        async def restore(self, records: list[Record], keyed: dict[str, int]) -> None:
            self.sizes.append(len(records))
            await super().restore(records, keyed)

    async def main() -> None:
        keyed = Keyed(Told_(Limits(), Drawer()), Limits())
        for i in range(9):
            keyed.keys.keep(keyed.keys.add("t", f"{i}", "f", Origin("m", "c", 0, i)), 1 << 20)
        await keyed.sync()
        assert sum(Told_.sizes) == 9
        assert max(Told_.sizes) <= 5

    asyncio.run(main())


def test_the_ledgers_process_needs_no_torch() -> None:
    code = "import sys, scoreray.cluster.serve.handles; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
