"""The service behind HTTP: which model, which limits, one draw for each request, again where a replica died.

A request becomes a job, whose samples are a function of (checkpoint, request), so a draw may be begun again anywhere
and two requests with one key may share one draw. It knows nothing of HTTP and nothing of Ray: replicas are behind
`Backend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from scoreray.data.errors import ScorerayError, nearest
from scoreray.sampling.serve_access import Access
from scoreray.sampling.serve_config import Refused, ServeConfig
from scoreray.sampling.serve_keys import Entry, Keys, seed_of
from scoreray.sampling.serve_metrics import SERVICE_METRICS, Meter, merged
from scoreray.sampling.serve_models import Served, look_up
from scoreray.sampling.serve_replica import Event, Job, Replica
from scoreray.sampling.serve_request import SampleBody, make_job

log = logging.getLogger("scoreray.serve")

MAX_DEATHS = 8  # of replicas on one request, before it is thought to be their reason


class Lost(Exception):
    """A replica died, or was unreachable, with a job in its hands."""


class Backend(Protocol):
    """The replicas. `draw` raises Lost when the one that draws dies; `prepare` and `metrics` reach all of them."""

    def draw(self, job: Job) -> AsyncGenerator[Event, None]: ...

    async def prepare(self, checkpoint: str, ema: str) -> None: ...

    async def metrics(self) -> dict[str, str]: ...


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


@dataclass(frozen=True)
class Answer:
    """What a run ends in: the encoded samples, and what made them."""

    body: bytes
    about: dict[str, Any]


class Origin(NamedTuple):
    """What a job is made from beside the request: enough to make the same one again, and small enough to remember."""

    model: str
    checkpoint: str
    images_seen: int
    seed: int


class Run:
    """One draw and everybody who waits for it; given up when nobody does."""

    def __init__(self, job: Job, served: Served, seed: int, body: SampleBody) -> None:
        self.job, self.served, self.seed, self.body = job, served, seed, body
        self.started = time.monotonic()
        self.task: asyncio.Task[Answer] | None = None
        self.accepted = asyncio.Event()
        self.progress = 0.0
        self.waiters = 0
        self.entry: Entry[Origin, Run] | None = None
        self._queues: set[asyncio.Queue[Event | None]] = set()

    def show(self, preview: Event) -> None:
        """Hands a preview on, unless one as late was shown before (by a replica that died since)."""
        if preview["progress"] > self.progress:
            self.progress = preview["progress"]
            for queue in self._queues:
                queue.put_nowait(preview)

    def end(self) -> None:
        self.accepted.set()
        for queue in self._queues:
            queue.put_nowait(None)

    async def previews(self) -> AsyncIterator[Event]:
        """The previews from now on, until the run ends."""
        queue = asyncio.Queue[Event | None]()
        self._queues.add(queue)
        try:
            if self.task is not None and self.task.done():
                return
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    async def answer(self) -> Answer:
        assert self.task is not None
        return await asyncio.shield(self.task)


class Service:
    """Requests in, answers out. One of it holds limits, keys and counters; all methods run on one event loop."""

    def __init__(self, config: ServeConfig, backend: Backend, *, busy_tries: int = 1) -> None:
        self.config, self.backend, self.limits = config, backend, config.limits
        self.access = Access(config.tokens, config.limits)
        self.meter = Meter(SERVICE_METRICS)
        self.models: dict[str, Served] = {}
        self.ready = self.draining = False
        self._busy_tries = busy_tries
        self._keys: Keys[Origin, Run] = Keys(config.limits)
        self._runs: set[Run] = set()
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

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self, timeout_s: float) -> int:
        """Takes no more requests, waits for those under way; returns how many did not end in time."""
        self.draining = True
        deadline = time.monotonic() + timeout_s
        while self._runs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return len(self._runs)

    def under_way(self) -> int:
        return len(self._runs)

    async def submit(self, body: SampleBody, *, token: str, key: str | None, media: str) -> Run:
        """The run that answers a request: a new one, or that of the same key. The caller must `leave` it."""
        self._check_open()
        fingerprint = body.fingerprint(media)
        entry = self._keys.find(token, key, fingerprint) if key is not None else None
        if entry is None or entry.run is None:
            served, seed = self._origin(body, token, key, entry)
            job = await asyncio.to_thread(make_job, body, served, self.limits, media, seed)
            self._check_open()
            if key is not None:  # asked again: another request may have brought it meanwhile
                origin = Origin(served.name, served.info.url, served.info.images_seen, seed)
                entry = self._keys.find(token, key, fingerprint) or self._keys.add(token, key, fingerprint, origin)
        if entry is not None and entry.run is not None:
            self.meter["replayed"].inc()
            run = entry.run
        else:
            run = self._begin(Run(job, served, seed, body), token, entry)
        run.waiters += 1
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
            served, before = self._served(entry.origin.model), entry.origin
            info = replace(served.info, url=before.checkpoint, images_seen=before.images_seen)
            return replace(served, info=info), before.seed
        seed = body.seed if body.seed is not None else (seed_of(token, key) if key else secrets.randbelow(2**31))
        return self._served(body.model), seed

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
            if answered and not (entry and entry.billed):
                self.meter["billed_rows"].labels(token).inc(len(run.job.seeds))
            if entry is not None:
                entry.billed = entry.billed or answered
                if answered and entry.run is run:
                    self._keys.keep(entry, len(task.result().body) + run.job.num_bytes)
                elif entry.run is run:
                    entry.run = None
            run.end()

        run.task.add_done_callback(ended)
        return run

    async def _draw(self, run: Run) -> Answer:
        """Draws a run's job, on another replica when one dies or is too busy. Raises Refused."""
        limits, deaths, busy = self.limits, 0, 0
        try:
            async with asyncio.timeout(limits.max_request_s):
                while True:
                    try:
                        return await self._draw_once(run)
                    except Lost as error:
                        deaths += 1
                        if deaths == MAX_DEATHS:
                            raise Refused("replica_lost", f"{deaths} replicas died on this request: {error}") from None
                        self.meter["retries"].inc()
                        log.warning("a replica was lost (%s): drawing again", error)
                        await asyncio.sleep(min(2.0, 0.05 * 2**deaths))
                    except Refused as refusal:
                        busy += 1
                        if refusal.code != "overloaded" or busy >= self._busy_tries:
                            raise
        except TimeoutError:
            message = f"no answer within {limits.max_request_s:g} s: ask for fewer samples or steps"
            raise Refused("timed_out", message, retry_after_s=30) from None

    async def _draw_once(self, run: Run) -> Answer:
        async with contextlib.aclosing(self.backend.draw(run.job)) as events:
            async for event in events:
                if event["kind"] == "accepted":
                    run.accepted.set()
                elif event["kind"] == "preview":
                    run.show(event)
                elif event["kind"] == "done":
                    return Answer(event["body"], self._about(run, event))
                elif event.get("gone") and await self._moved(run):
                    raise Lost(event["message"])
                else:
                    raise Refused(event["code"], event["message"], retry_after_s=event.get("retry_after_s"))
        raise Lost("the draw ended without an answer")

    async def _moved(self, run: Run) -> bool:
        """Takes a run to the model's newest checkpoint when its own was removed from the store meanwhile."""
        await self._reload(run.served.name)
        served = self.models[run.served.name]
        if served.info.url == run.job.checkpoint:
            return False
        run.served, run.job = served, replace(run.job, checkpoint=served.info.url)
        return True

    def _about(self, run: Run, done: Event) -> dict[str, Any]:
        return {
            "model": run.served.name,
            "checkpoint": run.job.checkpoint,
            "images_seen": run.served.info.images_seen,
            "ema": run.job.ema,
            "precision": done["precision"],
            "sampler": run.job.sampler,
            "steps": len(run.job.sigmas) - 1,
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


def json_answer(request_id: str, answer: Answer) -> bytes:
    """The JSON of an answer: what made the samples, then `data`, an array that is already JSON."""
    head = json.dumps({"id": request_id, **answer.about})
    return head[:-1].encode() + b', "data": ' + answer.body + b"}"
