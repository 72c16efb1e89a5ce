"""What one replica of a service does: keeps models in memory, each with a step batcher, and draws what it is asked for.

It knows nothing of HTTP and nothing of Ray. A job names its checkpoint and carries everything that its samples depend
on, so every replica gives it the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError, UserError
from scoreray.sampling.model.describe import is_picture
from scoreray.sampling.model.fast import Fast, make_fast
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.offline.driver import in_same_rows
from scoreray.sampling.service.answers import encode, preview_sheet
from scoreray.sampling.service.batcher import SampleRequest, StepBatcher, Ticket
from scoreray.sampling.service.config import ServeConfig
from scoreray.sampling.service.job import Event, Job
from scoreray.sampling.service.metrics import REPLICA_METRICS, Meter

log = logging.getLogger("scoreray.serve")

PREVIEW_ROWS = 16
STAY_CALLS = 4  # of a row at one level, before it is one that its sampler stays at


@dataclass
class _Model:
    denoiser: LoadedDenoiser
    batcher: StepBatcher
    fast: Fast
    users: int = 0


class Replica:
    """Draws jobs. All methods run on one event loop; the networks run in their batchers' threads."""

    def __init__(self, config: ServeConfig, device: str | None = None) -> None:
        self.config, self.device = config, device
        self.meter = Meter(REPLICA_METRICS)
        self._models: OrderedDict[tuple[str, str], _Model] = OrderedDict()
        self._loading: dict[tuple[str, str], asyncio.Task[_Model]] = {}
        self._freed = asyncio.Condition()
        self._arriving = 0  # rows of jobs that wait for their model
        if config.threads:
            torch.set_num_threads(config.threads)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        """Loads a checkpoint's weights and warms them up, so that the next job finds them ready."""
        async with self._model(checkpoint, ema):
            pass

    async def draw(self, job: Job) -> AsyncGenerator[Event, None]:
        """The events of a job. Leaving it early gives its rows up before the next call of the network."""
        refusal = self._refusal(job)
        if refusal is not None:
            yield refusal
            return
        yield {"kind": "accepted"}
        try:
            async with contextlib.AsyncExitStack() as stack:
                self._arriving += len(job.seeds)
                try:
                    model = await stack.enter_async_context(self._model(job.checkpoint, job.ema))
                except ScorerayError as error:
                    yield {"kind": "refused", "code": "storage", "message": str(error), "gone": True}
                    return
                finally:
                    self._arriving -= len(job.seeds)
                events = await stack.enter_async_context(contextlib.aclosing(self._run(job, model)))
                async for event in events:
                    yield event
        except UserError as error:
            yield {"kind": "refused", "code": "invalid", "message": str(error)}
        except ScorerayError as error:
            code = "not_finite" if "not finite" in str(error) else "invalid"
            yield {"kind": "refused", "code": code, "message": str(error)}

    async def _run(self, job: Job, model: _Model) -> AsyncGenerator[Event, None]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        arrived = time.monotonic()
        preview = _Previews(job, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        ticket = model.batcher.submit(
            SampleRequest(
                seeds=job.seeds,
                shape=job.shape,
                sigmas=job.sigmas,
                sampler=job.sampler,
                options=job.options,
                class_labels=None if job.labels is None else torch.tensor(job.labels, dtype=torch.int64),
                guidance=job.guidance,
                preview=preview if job.previews else None,
                expected_calls=job.calls,
                max_calls=job.max_calls,
            )
        )
        ticket.add_done_callback(lambda _: loop.call_soon_threadsafe(events.put_nowait, None))
        try:
            while (event := await events.get()) is not None:
                yield await asyncio.to_thread(_drawn, event)
            samples = ticket.result(0)
            self._count(ticket, len(samples))
            labels = job.labels or (-1,) * len(samples)
            body = await asyncio.to_thread(encode, samples.cpu(), labels, job.media, job.format)
            yield {
                "kind": "done",
                "body": body,
                "queued_s": ticket.queued_s or 0.0,
                "took_s": time.monotonic() - arrived,
                "precision": model.fast.name,
            }
        finally:
            if ticket.cancel():
                self.meter["cancelled_rows"].inc(len(job.seeds))

    def _refusal(self, job: Job) -> Event | None:
        """Why not to take a job, by the rows and the time that those before it need; None to take it."""
        batchers = [model.batcher for model in self._models.values()]
        limits = self.config.limits
        rows = self._arriving + sum(batcher.rows_waiting for batcher in batchers)
        wait_s = self.wait_s()
        if rows == 0 or (rows + len(job.seeds) <= limits.max_waiting_rows and wait_s <= limits.max_wait_s):
            return None
        why = f"{rows} rows wait here, for about {wait_s:.0f} s; try again later, or ask for less"
        return {
            "kind": "refused",
            "code": "overloaded",
            "message": why,
            "retry_after_s": min(60.0, max(1.0, wait_s / 2)),
        }

    def wait_s(self) -> float:
        """How long what is queued will take, from the calls that are still expected and the time of the last ones."""
        batchers = [model.batcher for model in self._models.values()]
        return sum(b.work_waiting / b.max_batch * b.seconds_per_call for b in batchers)

    def waiting_rows(self) -> int:
        return self._arriving + sum(model.batcher.rows_waiting for model in self._models.values())

    def metrics(self) -> str:
        """This replica's part of the page for Prometheus."""
        self.meter["waiting_rows"].set(self.waiting_rows())
        self.meter["waiting_calls"].set(sum(model.batcher.work_waiting for model in self._models.values()))
        self.meter["models_loaded"].set(len(self._models))
        return self.meter.text()

    def check(self) -> None:
        """Raises when a batcher's thread is gone: this replica can't draw any more."""
        for model in self._models.values():
            if not model.batcher.alive:
                raise RuntimeError(f"the batcher of {model.denoiser.info.url} stopped")

    async def close(self) -> None:
        """Finishes what is queued, then ends the threads."""
        models = list(self._models.values())
        self._models.clear()
        for model in models:
            await asyncio.to_thread(model.batcher.__exit__, None, None, None)

    @contextlib.asynccontextmanager
    async def _model(self, checkpoint: str, ema: str) -> AsyncIterator[_Model]:
        """A model in memory, which stays there meanwhile; loaded first where it is not."""
        key = (checkpoint, ema)
        while key not in self._models:
            task = self._loading.get(key)
            if task is None:
                task = self._loading[key] = asyncio.create_task(self._load(key))
                task.add_done_callback(lambda _: self._loading.pop(key, None))
            await asyncio.shield(task)
        model = self._models[key]
        self._models.move_to_end(key)
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1
            async with self._freed:
                self._freed.notify_all()

    async def _load(self, key: tuple[str, str]) -> _Model:
        await self._make_room()
        model = await asyncio.to_thread(self._build, *key)
        self._models[key] = model
        self.meter["model_loads"].inc()
        return model

    async def _make_room(self) -> None:
        """Drops models that nobody uses, the longest unused first; waits for one where all are in use."""
        while len(self._models) + len(self._loading) > self.config.max_models:
            idle = next((key for key, model in self._models.items() if model.users == 0), None)
            if idle is not None:
                model = self._models.pop(idle)
                await asyncio.to_thread(model.batcher.__exit__, None, None, None)
            else:
                async with self._freed:
                    await self._freed.wait()

    def _build(self, checkpoint: str, ema: str) -> _Model:
        denoiser = load(checkpoint, ema, self.device)
        config, most = self.config, self.config.max_batch
        fast = make_fast(
            denoiser,
            most,
            precision=config.precision,
            compile_=config.compile,
            limit_s=config.warmup_s,
            sizes=(max(2, most // 4), max(2, most // 16)),
            pad_always=False,
        )
        device = next(denoiser.parameters()).device
        drawn_by = fast.denoiser
        if (config.precision, config.compile) == ("fp32", "off"):  # asked for the same bits, whatever it costs
            drawn_by = in_same_rows(denoiser, most)
        batcher = StepBatcher(drawn_by, most, device=device, observe=self._observe)
        log.info("model %s, EMA %s: ready, %s", checkpoint, ema, fast.name)
        return _Model(denoiser, batcher.__enter__(), fast)

    def _observe(self, rows: int, seconds: float) -> None:
        self.meter["batch_occupancy"].observe(rows / self.config.max_batch)
        self.meter["step_seconds"].observe(seconds)
        self.meter["nfe"].inc(rows)

    def _count(self, ticket: Ticket, rows: int) -> None:
        self.meter["samples"].inc(rows)
        self.meter["queue_seconds"].observe(ticket.queued_s or 0.0)


class _Previews:
    """Gathers the estimates of a job's first rows; sends one event whenever another share of their calls is made.

    The level told is the highest one that a row of the sheet was denoised at. It falls from event to event, but for
    samplers that call the network many times at one level: after STAY_CALLS there the next share is shown all the same.
    """

    def __init__(self, job: Job, send: Callable[[Event], object]) -> None:
        self._job, self._send = job, send
        self._rows = min(PREVIEW_ROWS, len(job.seeds))
        self._estimate = torch.zeros(self._rows, *job.shape)
        self._levels = [math.inf] * self._rows
        self._total = max(1, self._rows * job.calls)
        self._done = self._sent = self._done_then = 0
        self._level_then = math.inf

    def __call__(self, first: int, sigma: float | Tensor, denoised: Tensor) -> None:
        shown = denoised[: max(0, self._rows - first)]
        if not len(shown):
            return
        rows = slice(first, first + len(shown))
        self._estimate[rows] = shown.float().cpu()
        self._levels[rows] = [sigma.max().item() if isinstance(sigma, Tensor) else sigma] * len(shown)
        self._done += len(shown)
        share, level = min(1.0, self._done / self._total), max(self._levels)
        count = min(self._job.previews, int(share * (self._job.previews + 1)))
        stayed = self._done - self._done_then >= STAY_CALLS * self._rows
        if count > self._sent and math.isfinite(level) and (level < self._level_then or stayed):
            self._sent, self._done_then, self._level_then = count, self._done, level
            self._send({"kind": "preview", "progress": share, "sigma": level, "denoised": self._estimate.clone()})


def _drawn(event: Event) -> Event:
    """An event on its way out: its estimates as a picture, or as numbers where they are none."""
    denoised = event.pop("denoised")
    if is_picture(denoised.shape[1:]):
        return {**event, "b64_json": preview_sheet(denoised)}
    return {**event, "denoised": denoised.flatten(1).tolist() if denoised[0].numel() <= 64 else None}
