"""One replica of a service: keeps models in memory, each with a step batcher, and draws requests with them.

It knows nothing of HTTP and nothing of Ray. A request names its checkpoint and carries everything that its samples
depend on, so every replica gives the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError, UserError
from scoreray.sampling.model.adapters import AdaptedNetwork, find_adapters
from scoreray.sampling.model.describe import ModelInfo, describe
from scoreray.sampling.model.fast import Fast, make_fast
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.model.row_queue import RowQueue, decode_queue
from scoreray.sampling.model.text_encoding import MOST_AT_ONCE, load_text_encoders, read_all
from scoreray.sampling.offline.driver import in_same_rows
from scoreray.sampling.offline.generate import class_labels
from scoreray.sampling.service.answers import as_pictures, encode
from scoreray.sampling.service.batcher import BatcherStopped, StepBatcher
from scoreray.sampling.service.config import ServeConfig
from scoreray.sampling.service.metrics import REPLICA_METRICS, Meter
from scoreray.sampling.service.previews import DenoisedEstimate, PreviewSender, preview_of
from scoreray.sampling.service.request import Accepted, Completed, Event, Failed, SampleRequest
from scoreray.sampling.service.ticket import NonFiniteSamplesError, Ticket
from scoreray.trainer.diffusion.condition import Condition, class_name_of

log = logging.getLogger("scoreray.serve")


@dataclass
class _Model:
    denoiser: LoadedDenoiser
    batcher: StepBatcher
    fast: Fast
    texts: RowQueue[Condition, Condition]
    decoding: RowQueue[Tensor, Tensor] | None = None  # of a model of latents
    users: int = 0

    async def read(self, request: SampleRequest) -> SampleRequest:
        """The request with its texts read, where an encoder of the data reads them, beside the calls of the network."""
        condition, negative = await self._read(request.condition), await self._read(request.negative)
        return replace(request, condition=condition, negative=negative)

    async def _read(self, given: Condition | None) -> Condition | None:
        if given is None or not given.is_unread(self.denoiser.info.conditions):
            return given
        return await asyncio.wrap_future(self.texts.submit(given))

    def close(self) -> None:
        """Finishes what is queued, then ends the threads."""
        self.texts.close()
        self.batcher.close()
        if self.decoding is not None:
            self.decoding.close()


class Replica:
    """Draws requests. All methods run on one event loop; the networks run in their batchers' threads."""

    def __init__(self, config: ServeConfig, device: str | None = None) -> None:
        self.config, self.device = config, device
        self.meter = Meter(REPLICA_METRICS)
        self._models: OrderedDict[tuple[str, str], _Model] = OrderedDict()
        self._loading: dict[tuple[str, str], asyncio.Task[_Model]] = {}
        self._freed = asyncio.Condition()
        self._arriving = 0  # rows of requests that wait for their model
        if config.threads:
            torch.set_num_threads(config.threads)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        """Loads a checkpoint's weights and warms them up, so that the next request finds them ready."""
        async with self._model(checkpoint, ema):
            pass

    async def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        """The events of a request. Leaving it early gives its rows up before the next call of the network."""
        overloaded = self._overloaded(request)
        if overloaded is not None:
            yield overloaded
            return
        yield Accepted()
        async with contextlib.AsyncExitStack() as stack:
            self._arriving += len(request.seeds)
            try:
                model = await stack.enter_async_context(self._model(request.origin.checkpoint, request.ema))
                request = await model.read(request)
            except ScorerayError as error:
                yield Failed("storage", str(error))
                return
            finally:
                self._arriving -= len(request.seeds)
            try:
                events = await stack.enter_async_context(contextlib.aclosing(self._run(request, model)))
                async for event in events:
                    yield event
            except ScorerayError as error:
                yield failed(error)

    async def _run(self, request: SampleRequest, model: _Model) -> AsyncGenerator[Event, None]:
        loop, estimates = asyncio.get_running_loop(), asyncio.Queue[DenoisedEstimate | None]()
        arrived, info = time.monotonic(), model.denoiser.info
        show = PreviewSender(request, lambda estimate: loop.call_soon_threadsafe(estimates.put_nowait, estimate))
        shown = show if request.previews else None
        if self.config.parallel:
            ticket = model.batcher.queue(await asyncio.to_thread(model.batcher.ticket, request, shown))
        else:
            ticket = model.batcher.submit(request, shown)
        ticket.add_done_callback(lambda _: loop.call_soon_threadsafe(estimates.put_nowait, None))
        try:
            while (estimate := await estimates.get()) is not None:
                yield await asyncio.to_thread(preview_of, estimate, info)
            samples = ticket.result(0)
            self._count(ticket, len(samples))
            info = info.as_latents() if request.raw else info
            if model.decoding is None or request.raw:
                values = await asyncio.to_thread(info.decoded, samples.cpu().float())
            else:
                values = await asyncio.wrap_future(model.decoding.submit(samples.cpu()))
            body = await asyncio.to_thread(_encoded, values, request, info)
            took_s = time.monotonic() - arrived
            accepted = ticket.acceptance.rate
            queued_s = ticket.queued_s or 0.0
            yield Completed(body, model.fast.name, queued_s, took_s, accepted, ticket.rows, parallel=ticket.parallel)
        finally:
            if ticket.cancel():
                self.meter["cancelled_rows"].inc(len(request.seeds))

    def _overloaded(self, request: SampleRequest) -> Failed | None:
        """Why not to take a request, by the rows and the time that those before it need; None to take it."""
        batchers = [model.batcher for model in self._models.values()]
        limits = self.config.limits
        rows = self._arriving + sum(batcher.rows_waiting for batcher in batchers)
        wait_s = self.wait_s()
        if rows == 0 or (rows + len(request.seeds) <= limits.max_waiting_rows and wait_s <= limits.max_wait_s):
            return None
        message = f"{rows} samples wait in this replica, for about {wait_s:.0f} s; try again later, or request fewer"
        return Failed("overloaded", message, retry_after_s=min(60.0, max(1.0, wait_s / 2)))

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
            await asyncio.to_thread(model.close)

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
                await asyncio.to_thread(model.close)
            else:
                async with self._freed:
                    await self._freed.wait()

    def _build(self, checkpoint: str, ema: str) -> _Model:
        denoiser = load(checkpoint, ema, self.device)
        info = denoiser.info
        info.check_decodes()
        config, most = self.config, self.config.max_batch
        adapted = bool(config.adapters) and ema == describe(checkpoint, config.ema).info.ema
        if adapted:
            device = next(denoiser.parameters()).device
            assert isinstance(denoiser.network, torch.nn.Module)
            network = AdaptedNetwork(denoiser.network, find_adapters(config.adapters, describe(checkpoint, ema).stored))
            denoiser.network = network.requires_grad_(False).eval().to(device)
        fast = make_fast(
            denoiser,
            most,
            precision=config.precision,
            compile_="off" if adapted else config.compile,
            limit_s=config.warmup_s,
            sizes=(max(2, most // 4), max(2, most // 16)),
            pad_always=False,
        )
        device = next(denoiser.parameters()).device
        drawn_by, at_once = fast.denoiser, MOST_AT_ONCE
        if (config.precision, config.compile) == ("fp32", "off"):  # asked for the same bits, whatever it costs
            drawn_by, at_once = in_same_rows(denoiser, most), 1
        called = drawn_by.network
        choose = called.choose if isinstance(called, AdaptedNetwork) else None
        batcher = StepBatcher(
            drawn_by, most, parallel=config.parallel, device=device, observe=self._observe, choose=choose
        )
        log.info("model %s, EMA %s: ready, %s", checkpoint, ema, fast.name)
        try:
            load_text_encoders(denoiser.info.conditions)
        except ScorerayError as error:
            log.warning("model %s: draws for no texts: %s", checkpoint, error)
        texts = RowQueue[Condition, Condition](lambda given: read_all(given, info.conditions, at_once), "texts")
        decoding = decode_queue(info.decoded) if info.encoding else None
        return _Model(denoiser, batcher.start(), fast, texts, decoding)

    def _observe(self, rows: int, seconds: float) -> None:
        self.meter["batch_occupancy"].observe(rows / self.config.max_batch)
        self.meter["step_seconds"].observe(seconds)
        self.meter["nfe"].inc(rows)

    def _count(self, ticket: Ticket, rows: int) -> None:
        self.meter["samples"].inc(rows)
        self.meter["queue_seconds"].observe(ticket.queued_s or 0.0)


def failed(error: ScorerayError) -> Failed:
    """How a request ends whose draw raised `error`. Raises it again where it is none of a request's own failures."""
    if isinstance(error, NonFiniteSamplesError):
        return Failed("not_finite", str(error))
    if isinstance(error, UserError):
        return Failed("invalid", str(error))
    if isinstance(error, BatcherStopped):  # Serve's health check replaces this replica within a second
        return Failed("unavailable", str(error))
    raise error


def _encoded(values: Tensor, request: SampleRequest, info: ModelInfo) -> bytes:
    """Decoded samples as the request wants them: pictures, or values in the data's own units (-1 to 1 of pictures)."""
    if request.format != "npy" or request.media == "image/png":
        shown = as_pictures(values, info.is_picture)
    else:
        shown = values
    name = class_name_of(info.conditions)
    classes = None if request.condition is None or name is None else request.condition.select([name])
    return encode(shown, class_labels(classes, len(values)).tolist(), request.media, request.format)
