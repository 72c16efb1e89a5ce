"""The service behind HTTP: which model, which limits, one draw for each request, again where a replica died.

A request becomes a job, whose samples are a function of (checkpoint, request), so a draw may be begun again anywhere
and two requests with one key may share one draw. It knows nothing of HTTP and nothing of Ray: replicas are behind
`Backend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from scoreray.data.errors import ScorerayError, nearest
from scoreray.sampling.service.access import Access
from scoreray.sampling.service.config import Refused, ServeConfig
from scoreray.sampling.service.job import MAX_DEATHS, Backend, Event, Job, Lost, drawn, timed_out
from scoreray.sampling.service.keyed import Keyed
from scoreray.sampling.service.keys import Entry, seed_of
from scoreray.sampling.service.ledger import Ledger, LedgerLike, Origin
from scoreray.sampling.service.metrics import SERVICE_METRICS, Meter, merged
from scoreray.sampling.service.models import Served, look_up
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import SampleBody, make_job
from scoreray.sampling.service.run import Answer, Run

log = logging.getLogger("scoreray.serve")

METRICS_SYNC_S = 2.0
LAST_ANSWERS_S = 5.0  # for those who are told at the end of a drain that it is over


class LocalBackend:
    """One replica in this process."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def draw(self, job: Job) -> AsyncGenerator[Event, None]:
        return self.replica.draw(job)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        await self.replica.prepare(checkpoint, ema)

    async def metrics(self) -> dict[str, str]:
        return {"local": self.replica.metrics()}


class Service:
    """Requests in, answers out. One of it holds limits and counters; all methods run on one event loop.

    ledger: what draws requests with a key; None for one in this process.
    """

    def __init__(
        self, config: ServeConfig, backend: Backend, *, busy_tries: int = 1, ledger: LedgerLike | None = None
    ) -> None:
        self.config, self.backend, self.limits = config, backend, config.limits
        self.access = Access(config.tokens, config.limits)
        self.meter = Meter(SERVICE_METRICS)
        self.models: dict[str, Served] = {}
        self.ready = self.draining = False
        self._busy_tries = busy_tries
        self._keyed = Keyed(ledger or Ledger(config.limits, backend, busy_tries), config.limits)
        self._runs: set[Run] = set()
        self.answering: set[object] = set()  # requests whose answer is not sent yet
        self._reloading: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Finds the models and waits until replicas have the default ones ready. Raises ScorerayErrors."""
        for name, url in self.config.models:
            self.models[name] = await asyncio.to_thread(look_up, name, url, self.config.ema)
            self._tell_images(self.models[name])
        for served in self.models.values():
            await self.backend.prepare(served.info.url, served.info.ema)
        self.ready = True
        self._spawn(self._follow())
        self._spawn(self._keyed.follow())

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self, timeout_s: float) -> int:
        """Takes no more requests, waits for those under way; returns how many did not end in time.

        These are refused then (draining), and the answers that say so have LAST_ANSWERS_S to be taken.
        """
        self.draining = True
        await self._until_none(self._runs, timeout_s)
        late = set(self._runs)
        for run in late:
            run.cut_off = Refused("draining", "the service ended before the samples were ready", retry_after_s=5)
            if run.task is not None:
                run.task.cancel()
        await self._until_none(self._runs, LAST_ANSWERS_S)
        await self._until_none(self.answering, LAST_ANSWERS_S)
        return len(late)

    async def _until_none(self, those: set[Any], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while those and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def under_way(self) -> int:
        return len(self._runs)

    async def submit(self, body: SampleBody, *, token: str, key: str | None, media: str) -> Run:
        """The run that answers a request: a new one, or that of the same key. The caller must `leave` it."""
        self._check_open()
        fingerprint, keys = body.fingerprint(media), self._keyed.keys
        entry = keys.find(token, key, fingerprint) if key is not None else None
        if entry is None or entry.run is None:
            served, seed = self._origin(body, token, key, entry)
            job = await asyncio.to_thread(make_job, body, served, self.limits, media, seed)
            self._check_open()
            if key is not None:  # asked again: another request may have brought it meanwhile
                origin = Origin(served.name, served.info.url, served.info.images_seen, seed)
                entry = keys.find(token, key, fingerprint) or keys.add(token, key, fingerprint, origin)
        if entry is not None and entry.run is not None:
            self.meter["replayed"].inc()
            run = entry.run
        else:
            run = self._begin(Run(job, served, seed, body), token, entry)
        run.waiters += 1
        run.asked += 1
        return run

    def leave(self, run: Run) -> None:
        """A caller has its answer or has gone. The last one to go before the answer ends the draw."""
        run.waiters -= 1
        if run.waiters == 0 and run.task is not None and not run.task.done():
            if run.entry is not None and run.entry.run is run:
                run.entry.run = None  # at once: the client may ask again before the task has ended
            run.task.cancel()

    async def metrics(self) -> str:
        """The page for Prometheus: this service and all of its replicas."""
        with contextlib.suppress(Lost, TimeoutError):
            async with asyncio.timeout(METRICS_SYNC_S):
                await self._keyed.sync()
        for token, rows in self._keyed.bills.more():
            self.meter["billed_rows"].labels(token).inc(rows)
        self.meter["requests_under_way"].set(len(self._runs))
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

    def _origin(
        self, body: SampleBody, token: str, key: str | None, entry: Entry[Origin, Run] | None
    ) -> tuple[Served, int]:
        """The model and the seed of a request; those that it had where its key was seen before. Raises Refused."""
        if entry is not None:
            return self._as_then(entry.origin), entry.origin.seed
        seed = body.seed if body.seed is not None else (seed_of(token, key) if key else secrets.randbelow(2**31))
        return self._served(body.model), seed

    def _as_then(self, origin: Origin) -> Served:
        """A model with the checkpoint that an earlier request of the same key was answered from."""
        served = self._served(origin.model)
        return replace(served, info=replace(served.info, url=origin.checkpoint, images_seen=origin.images_seen))

    def _served(self, name: str | None) -> Served:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refused("no_model", f"model '{name}' is not served here: {nearest(name, self.models)}", field="model")
        return self.models[name]

    def _begin(self, run: Run, token: str, entry: Entry[Origin, Run] | None) -> Run:
        rows = run.job.rows_per_call
        self.access.enter(token, rows)
        self._runs.add(run)
        if entry is not None:
            entry.run, run.entry = run, entry
        run.task = self._spawn(self._draw(run))

        def ended(task: asyncio.Task[Answer]) -> None:
            self._runs.discard(run)
            self.access.leave(token, rows)
            answered = not task.cancelled() and task.exception() is None
            if entry is None:
                self._keyed.bills.own[token] += len(run.job.seeds) if answered else 0
            elif answered:
                entry.billed = True
                if entry.run is run:
                    self._keyed.keys.keep(entry, len(task.result().body) + run.job.num_bytes)
            elif entry.run is run:
                entry.run = None
            run.end()

        run.task.add_done_callback(ended)
        return run

    async def _draw(self, run: Run) -> Answer:
        """Draws a run's job, or has the ledger draw it where it has a key. Raises Refused."""
        limit_s, instead_of = self.limits.max_request_s, None
        try:
            async with asyncio.timeout(limit_s):
                for _ in range(MAX_DEATHS):
                    last = await self._draw_once(run, instead_of)
                    if last["kind"] == "done":
                        return Answer(last["body"], self._about(run, last))
                    if last["kind"] == "origin":
                        await self._remake(run, last["origin"])
                    elif last.get("gone"):
                        instead_of = await self._moved(run)
                        if instead_of is None:
                            break
                    else:
                        break
                field = "options" if last["code"] == "not_finite" and run.job.options else None
                raise Refused(last["code"], last["message"], field=field, retry_after_s=last.get("retry_after_s"))
        except asyncio.CancelledError:
            if run.cut_off is None:
                raise
            raise run.cut_off from None
        except TimeoutError:
            late = timed_out(limit_s)
            raise Refused(late["code"], late["message"], retry_after_s=late["retry_after_s"]) from None

    async def _draw_once(self, run: Run, instead_of: Origin | None) -> Event:
        """The last event of a draw; shows the others."""
        last: Event = {}
        async with contextlib.aclosing(self._events(run, instead_of)) as events:
            async for last in events:
                if last["kind"] == "accepted":
                    run.accepted.set()
                elif last["kind"] == "preview":
                    run.show(last)
        run.replayed = bool(last.get("replayed"))
        self.meter["retries"].inc(0 if last.get("replayed") else last.get("deaths", 0))
        self.meter["replayed"].inc(1 if last.get("replayed") else 0)
        return last

    def _events(self, run: Run, instead_of: Origin | None) -> AsyncGenerator[Event, None]:
        if run.entry is not None:
            return self._keyed.events(run.entry, run.job, instead_of)
        return drawn(self.backend, run.job, self._busy_tries)

    async def _remake(self, run: Run, origin: Origin) -> None:
        """Makes a run's job again from what the ledger says that its key was made from."""
        assert run.entry is not None
        served = self._as_then(origin)
        run.job = await asyncio.to_thread(make_job, run.body, served, self.limits, run.job.media, origin.seed)
        run.served, run.seed, run.entry.origin = served, origin.seed, origin

    async def _moved(self, run: Run) -> Origin | None:
        """Takes a run to the model's newest checkpoint when its own was removed from the store meanwhile.

        What it was made from before; None where there is no newer one.
        """
        await self._reload(run.served.name)
        before, served = run.served, self.models[run.served.name]
        if served.info.url == run.job.checkpoint:
            return None
        run.served, run.job = served, replace(run.job, checkpoint=served.info.url, ema=served.ema(run.body.ema_length))
        if run.entry is not None:
            run.entry.origin = Origin(served.name, served.info.url, served.info.images_seen, run.seed)
        return Origin(before.name, before.info.url, before.info.images_seen, run.seed)

    def _about(self, run: Run, done: Event) -> dict[str, Any]:
        return {
            "model": run.served.name,
            "checkpoint": run.job.checkpoint,
            "images_seen": run.served.info.images_seen,
            "ema": run.job.ema,
            "precision": done["precision"],
            "sampler": run.job.sampler,
            "steps": len(run.job.sigmas) - 1,
            "grid": run.job.grid,
            "seed": run.seed,
            "guidance": run.job.guidance,
            "count": len(run.job.seeds),
            "format": run.job.format,
            "queued_s": round(done["queued_s"], 4),
            "took_s": round(done["took_s"], 4),
        }

    async def _follow(self) -> None:
        """Takes newer checkpoints as they are committed, once every replica has them in memory."""
        while True:
            await asyncio.sleep(self.config.reload_s)
            for name in list(self.models):
                await self._reload(name)

    async def _reload(self, name: str) -> None:
        """One look at the store at a time, whoever asks: one that does not answer shall hold one thread, not all."""
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
            newest = await asyncio.to_thread(look_up, name, served.url, self.config.ema)
            await self.backend.prepare(newest.info.url, newest.info.ema)
        except Exception as error:  # whatever it is, the old one answers, and the next look may go better
            self.meter["reloads"].labels("failed").inc()
            known = isinstance(error, ScorerayError | Lost)
            log.warning("model %s stays at %s: %r", name, served.info.url, error, exc_info=not known)
            return
        self.models[name] = newest
        self.meter["reloads"].labels("ok").inc()
        self._tell_images(newest)
        log.info("model %s: now %s, %d images seen", name, newest.info.url, newest.info.images_seen)

    def _tell_images(self, served: Served) -> None:
        self.meter["images_seen"].labels(served.name).set(served.info.images_seen)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
