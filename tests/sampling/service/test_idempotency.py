"""Idempotency keys over the deaths of processes: ingresses, replicas and both, and a store that can't be reached."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from scoreray.sampling.service.body import SampleBody
from scoreray.sampling.service.config import Limits, Refused, ServeConfig
from scoreray.sampling.service.draw import SampleAnswer
from scoreray.sampling.service.idempotency import Bills, kept, open_key_store
from scoreray.sampling.service.key_store import KeyStore, StoreLost
from scoreray.sampling.service.request import Accepted, Completed, Event, SampleRequest
from scoreray.sampling.service.service import Service


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "kept"))


class Drawer:
    """A replica process that draws nothing: an answer says how many draws have ended. `go` lets them end.

    A draw goes on when the ingress that began it is dead (`ingress_dies`), and stops where that one gives it up.
    """

    def __init__(self, keys_url: str | None, limits: Limits | None = None) -> None:
        self.begun = self.ended = self.given_up = 0
        self.go = asyncio.Event()
        self.ingress_is_dead = False
        self._store = open_key_store(keys_url, limits or Limits()) if keys_url else None
        self._draws: set[asyncio.Task[None]] = set()

    async def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        events = asyncio.Queue[Event]()
        draw = asyncio.create_task(self._carry_out(request, events))
        self._draws.add(draw)
        try:
            while not isinstance(event := await events.get(), Completed):
                yield event
            yield event
        finally:
            if not self.ingress_is_dead:
                draw.cancel()

    async def _carry_out(self, request: SampleRequest, events: asyncio.Queue[Event]) -> None:
        async for event in kept(self._store, request, self._events(request)):
            events.put_nowait(event)

    async def _events(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        self.begun += 1
        yield Accepted()
        try:
            await self.go.wait()
        except BaseException:
            self.given_up += 1
            raise
        self.ended += 1
        yield Completed(f"{self.ended} {request.origin.checkpoint} {request.seeds[0]}".encode(), "fp32", 0.0, 0.0)

    def die(self) -> None:
        for draw in self._draws:
            draw.cancel()

    async def prepare(self, checkpoint: str, ema: str) -> None:
        pass

    async def metrics(self) -> dict[str, str]:
        return {}


class Unreachable:
    """A store that stops to answer while `down`."""

    def __init__(self, keys_url: str) -> None:
        self._store, self.down = open_key_store(keys_url, Limits()), False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def called(*arguments: Any) -> Any:
            if self.down:
                raise StoreLost("down")
            return method(*arguments)

        return called


@contextlib.asynccontextmanager
async def ingress(
    run_url: str, drawer: Drawer, keys_url: str, limits: Limits | None = None, store: KeyStore | None = None
) -> AsyncIterator[Service]:
    service = Service(ServeConfig((("kept", run_url),), limits=limits or Limits(), keys=keys_url), drawer, store=store)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def draw_begins(service: Service, drawer: Drawer, **fields: Any) -> asyncio.Task[SampleAnswer]:
    request = asyncio.create_task(answered(service, **fields))
    await until(lambda: drawer.begun > 0)
    return request


async def answered(service: Service, key: str | None = "k", **fields: Any) -> SampleAnswer:
    draw = await service.submit(SampleBody(steps=3, **fields), token="ana", key=key, media="application/json")
    try:
        return await draw.answer()
    finally:
        service.leave(draw)


async def billed(service: Service) -> int:
    page = await service.metrics()
    lines = [line for line in page.splitlines() if line.startswith("scoreray_billed_rows_total{")]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


def test_an_answer_outlives_its_ingress_and_is_billed_once(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        drawer = Drawer(keys_url)
        drawer.go.set()
        async with ingress(run_url, drawer, keys_url) as first:
            await answered(first, None, count=3)
            before = await answered(first, count=2)
            assert await billed(first) == 5
        async with ingress(run_url, drawer, keys_url) as second:
            assert await billed(second) == 5  # the counter does not begin again
            again = await answered(second, count=2)
            assert (again.body, again.about) == (before.body, before.about)
            assert (drawer.ended, await billed(second)) == (2, 5)
            with pytest.raises(Refused, match="another request"):
                await answered(second, count=4)
            await answered(second, "other", count=1)
            assert await billed(second) == 6

    asyncio.run(main())


def test_a_draw_goes_on_when_its_ingress_dies_and_a_retry_waits_for_it(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        drawer = Drawer(keys_url)
        async with ingress(run_url, drawer, keys_url) as first:
            lost = await draw_begins(first, drawer, count=2)
            drawer.ingress_is_dead = True
        await asyncio.gather(lost, return_exceptions=True)
        async with ingress(run_url, drawer, keys_url) as second:
            joined = asyncio.create_task(answered(second, count=2))
            await asyncio.sleep(0.3)
            assert not joined.done()
            drawer.go.set()
            assert (await joined).body.startswith(b"1 ")
            assert (drawer.begun, drawer.ended, drawer.given_up, await billed(second)) == (1, 1, 0, 2)

    asyncio.run(main())


def test_a_draw_whose_ingress_and_replica_died_is_begun_again_soon(
    run_url: str, keys_url: str, lease_of: Callable[[float], None]
) -> None:
    lease_of(0.6)

    async def main() -> None:
        drawer, other = Drawer(keys_url), Drawer(keys_url)
        async with ingress(run_url, drawer, keys_url) as first:
            lost = await draw_begins(first, drawer, count=2)
            drawer.ingress_is_dead = True
        await asyncio.gather(lost, return_exceptions=True)
        async with ingress(run_url, other, keys_url) as second:
            again = asyncio.create_task(answered(second, count=2))
            await asyncio.sleep(1.2)  # two leases, renewed by the replica, which lives
            assert other.begun == 0
            drawer.die()
            await until(lambda: other.begun == 1)
            other.go.set()
            await again
            assert await billed(second) == 2

    asyncio.run(main())


def test_a_client_that_goes_gives_its_draw_up_and_may_come_back(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        drawer = Drawer(keys_url)
        async with ingress(run_url, drawer, keys_url) as service:
            gone = await draw_begins(service, drawer)
            gone.cancel()
            await until(lambda: drawer.given_up == 1)
            drawer.go.set()
            assert (await answered(service)).body.startswith(b"1 ")
            assert await billed(service) == 1

    asyncio.run(main())


def test_requests_with_one_key_share_a_draw_that_another_request_can_not_have(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        drawer = Drawer(keys_url)
        async with ingress(run_url, drawer, keys_url) as service:
            first = await draw_begins(service, drawer, count=2)
            second = asyncio.create_task(answered(service, count=2))
            with pytest.raises(Refused, match="another request"):
                await answered(service, count=3)
            drawer.go.set()
            assert (await first).body == (await second).body
            assert (drawer.begun, await billed(service)) == (1, 2)

    asyncio.run(main())


def test_a_store_that_is_slow_lets_no_two_draws_begin(run_url: str, keys_url: str) -> None:
    """The second request may find no answer in the store while the first one's draw begins and ends."""

    class Slow(Unreachable):
        def begin(self, *arguments: Any) -> Any:
            entry = self._store.begin(*arguments)
            time.sleep(random.uniform(0.0, 0.02))
            return entry

    async def main() -> None:
        drawer = Drawer(keys_url)
        drawer.go.set()
        async with ingress(run_url, drawer, keys_url, store=Slow(keys_url)) as service:
            for round_ in range(15):
                await asyncio.gather(*[answered(service, f"{round_}") for _ in range(4)])
            assert (drawer.begun, await billed(service)) == (15, 15)

    asyncio.run(main())


def test_keys_outlive_every_process(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        bodies = []
        for _ in range(2):
            drawer = Drawer(keys_url)
            drawer.go.set()
            async with ingress(run_url, drawer, keys_url) as service:
                bodies.append((await answered(service, "a", count=2)).body)
                await answered(service, None, count=3)
        assert bodies[0] == bodies[1]
        async with ingress(run_url, drawer, keys_url) as service:
            assert (drawer.ended, await billed(service)) == (1, 8)

    asyncio.run(main())


def test_without_its_store_a_key_is_refused_and_a_request_without_one_is_drawn(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        drawer, store = Drawer(keys_url), Unreachable(keys_url)
        drawer.go.set()
        async with ingress(run_url, drawer, keys_url, store=store) as service:
            before = await answered(service, "known")
            store.down = True
            for key in ("new", "known"):
                with pytest.raises(Refused) as refused:
                    await answered(service, key)
                assert (refused.value.code, refused.value.status, refused.value.retry_after) == (
                    "ledger_lost",
                    503,
                    "2",
                )
            assert drawer.ended == 1
            assert (await answered(service, None)).body.startswith(b"2 ")
            assert await billed(service) == 0  # as far as this ingress has read
            store.down = False
            assert (await answered(service, "new")).body.startswith(b"3 ")
            assert (await answered(service, "known")).body == before.body
            assert await billed(service) == 3

    asyncio.run(main())


def test_an_answer_that_can_not_be_stored_is_refused_and_not_billed(run_url: str, keys_url: str) -> None:
    async def main() -> None:
        drawer, store = Drawer(None), Unreachable(keys_url)  # the replica has no store: the ingress writes
        async with ingress(run_url, drawer, keys_url, store=store) as service:
            request = await draw_begins(service, drawer)
            store.down = True
            drawer.go.set()
            with pytest.raises(Refused, match="again with the same key") as refused:
                await request
            assert refused.value.code == "ledger_lost"
            store.down = False
            assert (await answered(service)).body.startswith(b"2 ")
            assert await billed(service) == 1

    asyncio.run(main())


def test_an_answer_that_was_let_go_is_drawn_again_and_not_billed_again(run_url: str, keys_url: str) -> None:
    limits = Limits(remember_keys=5, remember_bytes=4_000)

    async def main() -> None:
        drawer = Drawer(keys_url, limits)
        drawer.go.set()
        async with ingress(run_url, drawer, keys_url, limits) as service:
            for i in range(20):
                await answered(service, f"{i}")
        async with ingress(run_url, drawer, keys_url, limits) as second:
            assert (await answered(second, "19")).body.startswith(b"20 ")
            await answered(second, "15")
            assert (drawer.ended, await billed(second)) == (21, 20)

    asyncio.run(main())


def test_a_retry_is_made_from_what_its_key_was_made_from(
    tmp_path: Path, keys_url: str, new_run: Callable[..., str]
) -> None:
    """A newer checkpoint came between, and the stored answer was evicted: checkpoint and seed are the first draw's."""
    limits, run_url = Limits(remember_bytes=1), new_run(str(tmp_path / "run"))

    async def main() -> None:
        drawer = Drawer(keys_url, limits)
        drawer.go.set()
        async with ingress(run_url, drawer, keys_url, limits) as first:
            before = (await answered(first)).about
        new_run(run_url, 128)
        async with ingress(run_url, drawer, keys_url, limits) as second:
            assert (await answered(second, "new")).about["images_seen"] == 128
            again = (await answered(second)).about
            assert again == before
            assert again["images_seen"] == 64

    asyncio.run(main())


def test_counters_never_go_backwards_nor_count_twice(keys_url: str) -> None:
    async def main() -> None:
        store = open_key_store(keys_url, Limits())
        first, second = Bills(store, "first"), Bills(store, "second")
        first.add("a", 2)
        assert list(first.grown()) == []
        await first.sync()
        await first.sync()
        assert list(first.grown()) == [("a", 2)]
        second.add("a", 7)
        second.add("b", 1)
        await second.sync()
        assert sorted(second.grown()) == [("a", 9), ("b", 1)]
        await first.sync()
        assert sorted(first.grown()) == [("a", 7), ("b", 1)]
        assert list(first.grown()) == []

    asyncio.run(main())
