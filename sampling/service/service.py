"""The service behind HTTP: which model, which limits, one draw for each request, again where a replica died.

The samples are a function of the checked request, which names its checkpoint and seed, so a draw may be begun again
anywhere and two requests with one key may share one draw. It knows nothing of HTTP and nothing of Ray: replicas are
behind `Backend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from scoreray.data.errors import ScorerayError, nearest
from scoreray.sampling.service.access import Access
from scoreray.sampling.service.body import SampleBody, made_from, make_request
from scoreray.sampling.service.config import Refused, ServeConfig
from scoreray.sampling.service.draw import Draw, SampleAnswer, expected_cost
from scoreray.sampling.service.idempotency import Bills, begin_key, kept, open_key_store, seed_of
from scoreray.sampling.service.key_store import KeyStore, key_reused
from scoreray.sampling.service.metrics import SERVICE_METRICS, Meter, merged
from scoreray.sampling.service.models import ServedModel, look_up
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import (
    MAX_DEATHS,
    Accepted,
    Backend,
    Claim,
    Completed,
    Event,
    Failed,
    Lost,
    Origin,
    Preview,
    SampleRequest,
    draw_with_retries,
    timed_out,
)
from scoreray.sampling.service.ticket import terms_of

log = logging.getLogger("scoreray.serve")

METRICS_SYNC_S = 2.0
POLL_S = 0.1  # of the store, for the answer of a draw that another ingress, now dead, began
LAST_ANSWERS_S = 5.0  # for the refusals at the end of a drain to reach their clients


class LocalBackend:
    """One replica in this process."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        return self.replica.draw(request)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        await self.replica.prepare(checkpoint, ema)

    async def metrics(self) -> dict[str, str]:
        return {"local": self.replica.metrics()}


class Service:
    """Requests in, answers out. One of it holds limits and counters; all methods run on one event loop.

    store: of idempotency keys; None for the one that the config names.
    """

    def __init__(
        self, config: ServeConfig, backend: Backend, *, busy_tries: int = 1, store: KeyStore | None = None
    ) -> None:
        self.config, self.backend, self.limits = config, backend, config.limits
        self.access = Access(config.tokens, config.limits)
        self.meter = Meter(SERVICE_METRICS)
        self.models: dict[str, ServedModel] = {}
        self.ready = self.draining = False
        self._busy_tries = busy_tries
        self._store = store or open_key_store(config.keys, config.limits)
        self._owner = uuid.uuid4().hex
        self._bills = Bills(self._store, self._owner)
        self._draws: set[Draw] = set()
        self._by_key: dict[tuple[str, str], Draw] = {}  # of those, by token and idempotency key
        self.started_at = int(time.time())
        self.answering: set[object] = set()  # requests whose answer is not sent yet
        self._reloading: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Finds the models and waits until replicas have the default ones ready. Raises ScorerayErrors."""
        for name, url in self.config.models:
            self.models[name] = await asyncio.to_thread(self._look_up, name, url)
            self._count_images(self.models[name])
        for served in self.models.values():
            await self.backend.prepare(served.info.url, served.info.ema)
        self.ready = True
        self._spawn(self._follow())
        self._spawn(self._bills.follow())

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bills.sync()
        await asyncio.to_thread(self._store.close)

    async def drain(self, timeout_s: float) -> int:
        """Takes no more requests, waits for those under way; returns how many did not end in time.

        These are refused then (draining), and the answers that say so have LAST_ANSWERS_S to be taken.
        """
        self.draining = True
        await self._until_none(self._draws, timeout_s)
        late = set(self._draws)
        for draw in late:
            draw.cut_off = Refused("draining", "the service ended before the samples were ready", retry_after_s=5)
            if draw.task is not None:
                draw.task.cancel()
        await self._until_none(self._draws, LAST_ANSWERS_S)
        await self._until_none(self.answering, LAST_ANSWERS_S)
        await self._bills.sync()
        return len(late)

    async def _until_none(self, those: set[Any], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while those and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    @property
    def max_body_bytes(self) -> int:
        """Of a request for samples: more where a model takes conditions beside a class, or is not known yet."""
        specs = [spec for served in self.models.values() for spec in served.info.conditions.values()]
        larger = not self.models or any(spec.kind != "class" for spec in specs)
        return self.limits.max_body_bytes + (2 * self.limits.max_condition_bytes if larger else 0)

    def under_way(self) -> int:
        return len(self._draws)

    async def submit(self, body: SampleBody, *, token: str, key: str | None, media: str) -> Draw:
        """The draw that answers a request: a new one, or that of the same key. The caller must `leave` it."""
        self._check_open()
        claim = None
        if key is not None:  # the fingerprint of a condition of megabytes takes milliseconds
            claim = Claim(token, key, await asyncio.to_thread(body.fingerprint, media), self._owner)
        draw = self._under_way(claim)
        if draw is None:
            served = self.served(body.model)
            seed = body.seed if body.seed is not None else (seed_of(token, key) if key else secrets.randbelow(2**31))
            request = await asyncio.to_thread(make_request, body, served, self.limits, media, seed)
            self._check_open()
            # looked up again: another request may have brought the key meanwhile
            draw = self._under_way(claim) or self._begin(Draw(replace(request, claim=claim)), token)
        if draw.joined:
            self.meter["replayed"].inc()
        draw.waiting += 1
        draw.joined += 1
        return draw

    async def cost(self, body: SampleBody) -> dict[str, Any]:
        """What a request would cost, as JSON has it. Raises Refused where it would be refused."""
        served = self.served(body.model)
        return expected_cost(await asyncio.to_thread(make_request, body, served, self.limits, "application/json", 0))

    def _under_way(self, claim: Claim | None) -> Draw | None:
        """The draw of a key that this ingress has begun. Raises Refused where the key came with another request."""
        draw = self._by_key.get((claim.token, claim.key)) if claim is not None else None
        if draw is not None and draw.request.claim != claim:
            raise key_reused()
        return draw

    def _forget(self, draw: Draw) -> None:
        """Lets the next request with a draw's key begin another one."""
        claim = draw.request.claim
        if claim is not None and self._by_key.get((claim.token, claim.key)) is draw:
            del self._by_key[claim.token, claim.key]

    def leave(self, draw: Draw) -> None:
        """A request has its answer or its client has gone. The last one to go before the answer ends the draw."""
        draw.waiting -= 1
        if draw.waiting == 0 and draw.task is not None and not draw.task.done():
            self._forget(draw)  # at once: the client may send it again before the task has ended
            draw.task.cancel()

    async def metrics(self) -> str:
        """The page for Prometheus: this service and all of its replicas."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(METRICS_SYNC_S):
                await self._bills.sync()
        for token, rows in self._bills.grown():
            self.meter["billed_rows"].labels(token).inc(rows)
        self.meter["requests_under_way"].set(len(self._draws))
        try:
            replicas = await self.backend.metrics()
        except Exception as error:
            log.warning("metrics of replicas are missing: %s", error)
            replicas = {}
        return merged(self.meter.text(), replicas)

    def _check_open(self) -> None:
        if self.draining:
            raise Refused("draining", "the service is shutting down: another one may answer", retry_after_s=5)
        if not self.ready:
            raise Refused("starting", "the models are being loaded", retry_after_s=5)

    def all_served(self) -> list[ServedModel]:
        """The models, the default one first. Raises Refused until they are looked up."""
        if not self.models:
            raise Refused("starting", "the models are being looked up", retry_after_s=5)
        return list(self.models.values())

    def served(self, name: str | None) -> ServedModel:
        """The model of a name, the first one of None. Raises Refused."""
        if name is None:
            return self.all_served()[0]
        if name not in self.models:
            raise Refused("no_model", f"model '{name}' is not served here: {nearest(name, self.models)}", field="model")
        return self.models[name]

    def _begin(self, draw: Draw, token: str) -> Draw:
        claim, condition = draw.request.claim, draw.request.condition
        self._draws.add(draw)
        for name in condition.values if condition is not None else ():
            self.meter["condition_rows"].labels(name).inc(len(draw.request.seeds))
        if claim is not None:
            self._by_key[claim.token, claim.key] = draw
        draw.task = self._spawn(self._carry_out(draw, token))

        def ended(task: asyncio.Task[SampleAnswer]) -> None:
            self._draws.discard(draw)
            self._forget(draw)
            if claim is None and not task.cancelled() and task.exception() is None:
                self._bills.add(token, len(draw.request.seeds))
            draw.end()

        draw.task.add_done_callback(ended)
        return draw

    async def _carry_out(self, draw: Draw, token: str) -> SampleAnswer:
        """The answer of a key that has one, or a new draw's. Raises Refused."""
        try:
            async with asyncio.timeout(self.limits.max_request_s):
                last = await self._stored_answer(draw) or await self._draw_until_settled(draw, token)
        except asyncio.CancelledError:
            if draw.cut_off is None:
                raise
            raise draw.cut_off from None
        except TimeoutError:
            last = timed_out(self.limits.max_request_s)
        if isinstance(last, Completed):
            return SampleAnswer.of(draw.request, last)
        field = "options" if last.code == "not_finite" and draw.request.options else None
        raise Refused(last.code, last.message, field=field, retry_after_s=last.retry_after_s)

    async def _stored_answer(self, draw: Draw) -> Completed | None:
        """The answer of a key, waited for while a replica draws it for an ingress that died; None where there is none.

        Makes the request one to the checkpoint and seed that its key came with first.
        """
        while (claim := draw.request.claim) is not None:
            entry = await begin_key(self._store, claim, draw.request.origin)
            if entry.origin != draw.request.origin:
                draw.request = made_from(draw.request, entry.origin)
            if entry.answer is not None:
                draw.replayed = True
                self.meter["replayed"].inc()
                return entry.answer
            if entry.mine:
                return None
            draw.accepted.set()
            await asyncio.sleep(POLL_S)
        return None

    async def _draw_until_settled(self, draw: Draw, token: str) -> Completed | Failed:
        """The end of a draw, begun again from the newest checkpoint where its own was removed meanwhile."""
        with self.access.under_way(token, len(draw.request.seeds) * len(terms_of(draw.request))):
            for _ in range(MAX_DEATHS):
                last = await self._draw_once(draw)
                if isinstance(last, Completed) or last.code != "storage" or not await self._take_to_newest(draw):
                    return last
        return Failed("storage", "the checkpoints of this request are removed faster than they can be drawn from")

    async def _draw_once(self, draw: Draw) -> Completed | Failed:
        """The last event of a draw; shows the others."""
        events = draw_with_retries(self.backend, draw.request, self._busy_tries)
        async with contextlib.aclosing(kept(self._store, draw.request, events)) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    draw.accepted.set()
                elif isinstance(event, Preview):
                    draw.show(event)
                else:
                    self.meter["retries"].inc(event.deaths)
                    return event
        raise AssertionError("a draw has a last event")

    async def _take_to_newest(self, draw: Draw) -> bool:
        """Makes a request one to its model's newest checkpoint. False where that is the one it had."""
        before, claim = draw.request.origin, draw.request.claim
        await self._reload(before.model)
        newest = self.models[before.model]
        origin = Origin(newest.name, newest.info.url, newest.info.images_seen, before.seed)
        if newest.info.url == before.checkpoint:
            return False
        if claim is not None:
            origin = (await begin_key(self._store, claim, origin, instead_of=before)).origin
        draw.request = replace(made_from(draw.request, origin), ema=newest.ema(draw.request.ema))
        return True

    async def _follow(self) -> None:
        """Takes newer checkpoints as they are committed, once every replica has them in memory."""
        while True:
            await asyncio.sleep(self.config.reload_s)
            for name in list(self.models):
                await self._reload(name)

    async def _reload(self, name: str) -> None:
        """One look at the store at a time, for all requests: one that does not answer must hold one thread, not all."""
        task = self._reloading.get(name)
        if task is None:
            task = self._reloading[name] = self._spawn(self._take_newer(name))
            task.add_done_callback(lambda _: self._reloading.pop(name, None))
        await asyncio.shield(task)

    async def _take_newer(self, name: str) -> None:
        served = self.models[name]
        try:
            if not await asyncio.to_thread(served.newer):
                return
            newest = await asyncio.to_thread(self._look_up, name, served.url)
            await self.backend.prepare(newest.info.url, newest.info.ema)
        except Exception as error:  # whatever it is, the old one answers, and the next look may go better
            self.meter["reloads"].labels("failed").inc()
            known = isinstance(error, ScorerayError | Lost)
            log.warning("model %s stays at %s: %r", name, served.info.url, error, exc_info=not known)
            return
        self.models[name] = newest
        self.meter["reloads"].labels("ok").inc()
        self._count_images(newest)
        log.info("model %s: now %s, %d images seen", name, newest.info.url, newest.info.images_seen)

    def _look_up(self, name: str, url: str) -> ServedModel:
        return look_up(name, url, self.config.ema, self.config.samplers, self.config.adapters)

    def _count_images(self, served: ServedModel) -> None:
        self.meter["images_seen"].labels(served.name).set(served.info.images_seen)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
