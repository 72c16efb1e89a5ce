"""Step-level batching: many requests, each at its own sampler, step and noise level, share every call of one network.

A sampler is a generator that waits for a denoised batch, so a batcher holds many of them and, at each call, puts
together rows that wait. Rows have random numbers of their own: what a request gets does not depend on its batch-mates
(bitwise where the network's kernels give a row the same bits in any batch, else to rounding).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Self

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError, UserError
from scoreray.sampling.guidance.guidance import classifier_free_steps, doubled_labels
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.ode import Steps
from scoreray.sampling.samplers.sample import check_labels, per_row, start
from scoreray.sampling.samplers.sigmas import as_grid
from scoreray.sampling.service.request import SampleRequest

IN_TURN = 2  # one part in so many of each call goes to all requests in turn, whatever they need

ShowEstimate = Callable[[int, float | Tensor, Tensor], None]
"""Called in the batcher's thread after each call of the network: (first row, sigma, denoised [b, *shape])."""


class NonFiniteSamplesError(UserError):
    """The samples of a request are NaN or infinite: its options are too strong."""


class BatcherStopped(ScorerayError):
    """The batcher's thread has ended or ends: what it was given will not be drawn by it."""


class StepBatcher:
    """Runs requests on `denoiser`, at most `max_batch` of the network's rows a call.

    Half of each call goes to all requests in turn, the rest to those that have waited longest for the work they
    still need (highest response ratio next, Brinch Hansen 1971): short ones end soon, one sample does not wait behind
    4,096, and these, as they age, not for ever behind a stream of single ones. A request is split into parts of
    `part_rows`, begun one after another. A ticket that is cancelled frees its rows before the next call.
    batch_sizes: sizes to pad up to, for a network compiled for these; none by default.
    observe: called in the batcher's thread as (rows, seconds) after each call of the network.

    `start()` (or `with`) runs it in a thread of its own, until `close()`; else `step()` makes one call at a time.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        max_batch: int = 32,
        *,
        part_rows: int | None = None,
        batch_sizes: Sequence[int] = (),
        device: torch.device | str = "cpu",
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        if max_batch < 2:
            raise UserError(f"max_batch = {max_batch}: must be 2 or more, guidance takes two rows a sample")
        self.denoiser, self.max_batch, self.device = denoiser, max_batch, torch.device(device)
        self.part_rows = part_rows or max(1, max_batch // 8)
        if not 1 <= self.part_rows <= max_batch // 2:
            raise UserError(f"part_rows = {part_rows}: must be in [1, max_batch / 2 = {max_batch // 2}]")
        self.batch_sizes = sorted(batch_sizes)
        self.calls = self.rows = 0
        self.seconds_per_call = 0.0
        self._observe = observe
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, request: SampleRequest, show: ShowEstimate | None = None) -> Ticket:
        """Queues a request. Raises UserError at once on bad arguments; a failure on the way is the ticket's."""
        ticket = Ticket(request, self.part_rows, self.max_batch // self.part_rows, self.device, show)
        ticket.arrived = self.calls
        with self._changed:
            if self._closing:
                raise BatcherStopped("this batcher is closed: submit to another one")
            self._tickets.append(ticket)
            self._changed.notify()
        return ticket

    @property
    def rows_waiting(self) -> int:
        """Samples that are not done yet, of all requests: what to shed load and to scale by."""
        with self._changed:
            return sum(ticket.remaining for ticket in self._tickets if not ticket.done())

    @property
    def work_waiting(self) -> int:
        """Rows that the network is still expected to be called with, over all requests: used to estimate a wait."""
        with self._changed:
            return sum(max(ticket.work, ticket.remaining) for ticket in self._tickets if not ticket.done())

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def occupancy(self) -> float:
        """Mean share of `max_batch` that the calls so far have filled."""
        return self.rows / (self.calls * self.max_batch) if self.calls else 0.0

    def step(self) -> bool:
        """One call of the network, for the rows whose turn it is. False where nothing waits."""
        with self._changed:
            parts = self._choose()
        if not parts:
            return False
        started, rows = time.monotonic(), sum(len(part.x) for part in parts)
        with torch.no_grad():
            for part, denoised in zip(parts, self._denoise(parts), strict=True):
                part.advance(denoised)
        took = time.monotonic() - started
        self.seconds_per_call = took if not self.seconds_per_call else 0.9 * self.seconds_per_call + 0.1 * took
        if self._observe is not None:
            self._observe(rows, took)
        return True

    def start(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="step-batcher", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Finishes what is queued, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a bug: nobody may wait for ever
            with self._changed:
                self._closing = True
                tickets, self._tickets = self._tickets, deque()
            for ticket in tickets:
                ticket.fail(BatcherStopped(f"the batcher stopped: {error!r}"))
            raise

    def _serve(self) -> None:
        while True:
            if self.step():
                continue
            with self._changed:
                if not self._tickets:
                    if self._closing:
                        return
                    self._changed.wait()

    def _choose(self) -> list[_Part]:
        """The parts of the next call, all of one sample shape; rotates the requests, so each is first in its turn."""
        while True:
            self._tickets = deque(ticket for ticket in self._tickets if not ticket.done())
            if not self._tickets:
                return []
            self._tickets.rotate(-1)
            first = self._tickets[-1]
            shape = first.request.shape
            same = [first, *(ticket for ticket in list(self._tickets)[:-1] if ticket.request.shape == shape)]
            chosen: list[_Part] = []
            room, turns = self.max_batch, self.max_batch // IN_TURN
            for ticket in same:
                if self.max_batch - room >= turns:
                    break
                room -= ticket.take(max(1, turns // len(same)), room, chosen)
            for ticket in sorted(same, key=lambda ticket: ticket.response_ratio(self.calls), reverse=True):
                room -= ticket.take(room, room, chosen) if room else 0
            if chosen:
                return chosen

    def _denoise(self, parts: list[_Part]) -> list[Tensor | Exception]:
        """The denoised rows of each part from one call; if it fails, each part's own call finds who is at fault."""
        try:
            return list(self._call(parts))
        except Exception as error:
            if len(parts) == 1:
                return [error]
        return [self._denoise([part])[0] for part in parts]

    def _call(self, parts: list[_Part]) -> Sequence[Tensor]:
        x = torch.cat([part.x for part in parts])
        sigma = torch.cat([per_row(part.sigma, part.x) for part in parts])
        count = len(x)
        labels = None
        if any(part.labels is not None for part in parts):
            none = [torch.full((len(part.x),), -1, device=self.device) for part in parts]
            labels = torch.cat([n if part.labels is None else part.labels for part, n in zip(parts, none, strict=True)])
        padded = next((size for size in self.batch_sizes if size >= count), count)
        if padded > count:
            x, sigma = _pad(x, padded), _pad(sigma, padded)
            labels = None if labels is None else _pad(labels, padded)
        denoised = self.denoiser(x, sigma) if labels is None else self.denoiser(x, sigma, labels)
        if denoised.shape != x.shape or denoised.dtype != x.dtype:
            raise ScorerayError(
                f"the denoiser gave {list(denoised.shape)} {denoised.dtype} for {list(x.shape)} {x.dtype}"
            )
        self.calls += 1
        self.rows += count
        return denoised[:count].split([len(part.x) for part in parts])


class Ticket(Future[Tensor]):
    """A request in the batcher: the samples to come, [len(seeds), *shape], the parts that run and the rows not begun.

    `.result(timeout)` in a thread, `await` in asyncio, `.cancel()`. queued_s: how long the request waited for its first
    call of the network, once that has come. The rest is the batcher's.
    """

    def __init__(
        self, request: SampleRequest, part_rows: int, most_parts: int, device: torch.device, show: ShowEstimate | None
    ) -> None:
        super().__init__()
        self.request, self.part_rows, self.most_parts = request, part_rows, most_parts
        self.device, self.show = device, show
        self.queued_s: float | None = None
        if len(request.seeds) < 1:
            raise UserError("a request for no samples: give at least one seed")
        self.seeds = SampleNoise(request.seeds).seeds
        self.sigmas = as_grid(request.sigmas)
        self.remaining, self.begun = len(self.seeds), 0
        self.submitted, self.arrived = time.monotonic(), 0
        self.work = request.rows_per_call * request.expected_calls
        self.labels = None if request.class_labels is None else torch.as_tensor(request.class_labels)
        if self.labels is not None:
            check_labels(self.labels, self.remaining)
        if request.guidance != 1 and self.labels is None:
            raise UserError(f"guidance {request.guidance:g} needs class_labels: give one class per sample")
        self.parts: list[_Part] = []
        self.samples: dict[int, Tensor] = {}
        self._begin()  # finds a bad sampler or option before the request is queued

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.wrap_future(self).__await__()

    def response_ratio(self, calls: int) -> float:
        """Calls of the network since it came, for each row that it is still expected to take of them."""
        return (calls - self.arrived + 1) / max(self.work, self.remaining)

    def take(self, share: int, room: int, chosen: list[_Part]) -> int:
        """Adds parts of up to `share` rows in all, `room` at most, to `chosen`; returns the rows."""
        taken = 0
        for part in self._waiting():
            if taken >= share or taken + len(part.x) > room:
                break
            part.in_call = True
            chosen.append(part)
            taken += len(part.x)
        if taken and self.queued_s is None:
            self.queued_s = time.monotonic() - self.submitted
        self.work -= taken
        return taken

    def _waiting(self) -> Iterator[_Part]:
        """The parts that are in no call, the least advanced first, so that they end together.

        That begins new ones, but only while the request has no whole batch of parts that run.
        """
        idle = sorted((part for part in self.parts if not part.in_call), key=lambda part: part.calls)
        try:
            while len(self.parts) < self.most_parts and (part := self._begin()) is not None:
                yield part
        except Exception as error:
            self.fail(error)
        yield from idle

    def _begin(self) -> _Part | None:
        """Starts the sampler of the next rows; None where all have begun."""
        if self.begun >= len(self.seeds) or self.done():
            return None
        rows = slice(self.begun, self.begun + self.part_rows)
        noise = SampleNoise(self.seeds[rows])
        x = noise.normal((len(noise.seeds), *self.request.shape), torch.float32, self.device)
        x = x * float(self.sigmas[0])
        steps = start(self.request.sampler, x, self.sigmas, noise, **self.request.options)
        labels = None if self.labels is None else self.labels[rows].to(self.device)
        part = _Part(self, self.begun, steps, labels)
        self.begun += len(x)
        self.parts.append(part)
        return part

    def finish(self, part: _Part, samples: Tensor) -> None:
        if not bool(torch.isfinite(samples).all()):
            self.fail(NonFiniteSamplesError(f"sampler '{self.request.sampler}' ended in values that are not finite"))
            return
        self.parts.remove(part)
        self.samples[part.first] = samples
        self.remaining -= len(samples)
        if self.remaining == 0:
            _settle(self.set_result, torch.cat([self.samples[first] for first in sorted(self.samples)]))

    def fail(self, error: Exception) -> None:
        _settle(self.set_exception, error)


class _Part:
    """Some rows of a request: their sampler's generator, and the network call that it waits for."""

    def __init__(self, ticket: Ticket, first: int, steps: Steps, labels: Tensor | None) -> None:
        self.ticket, self.first, self.in_call, self.calls = ticket, first, False, 0
        guidance = ticket.request.guidance
        self.guided = guidance != 1 and labels is not None
        self.steps = classifier_free_steps(steps, guidance) if self.guided else steps
        self.labels = doubled_labels(labels) if self.guided and labels is not None else labels
        with torch.no_grad():
            self.x, self.sigma = next(self.steps)

    def advance(self, denoised: Tensor | Exception) -> None:
        """Takes what the network gave: on to the next wait, to the end, or to the request's failure."""
        self.in_call = False
        if isinstance(denoised, Exception):
            self.ticket.fail(denoised)
            return
        self.calls += 1
        request = self.ticket.request
        try:
            if request.max_calls is not None and self.calls > request.max_calls:
                raise UserError(
                    f"sampler '{request.sampler}' needed more than {request.max_calls} calls of the network for a "
                    "sample: take fewer steps or looser tolerances"
                )
            if self.ticket.show is not None:
                self.ticket.show(self.first, self.sigma, denoised[: len(denoised) // (2 if self.guided else 1)])
            self.x, self.sigma = self.steps.send(denoised)
        except StopIteration as end:
            self.ticket.finish(self, end.value)
        except Exception as error:
            self.ticket.fail(error)


def _settle(set_: Callable[[Any], None], value: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled while its last rows were on their way
        set_(value)


def _pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])])
