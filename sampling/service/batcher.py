"""Step-level batching: many requests, each at its own sampler, step and noise level, share every call of one network.

A sampler is a generator that waits for a denoised batch, so a batcher holds many of them and, at each call, puts
together rows that wait, with the null of each condition that a row was given no value of. Rows have random numbers of
their own: what a request gets does not depend on its batch-mates (bitwise where the network's kernels give a row the
same bits in any batch, else to rounding).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError, UserError
from scoreray.sampling.samplers.sample import per_row
from scoreray.sampling.service.request import SampleRequest
from scoreray.sampling.service.ticket import Part, ShowEstimate, Ticket
from scoreray.trainer.diffusion.condition import Condition

IN_TURN = 2  # one part in so many of each call goes to all requests in turn, whatever they need


class BatcherStopped(ScorerayError):
    """The batcher's thread has ended or ends: what it was given will not be drawn by it."""


class StepBatcher:
    """Runs requests on `denoiser`, at most `max_batch` of the network's rows a call.

    Half of each call goes to all requests in turn, the rest to those that have waited longest for the work they
    still need (highest response ratio next, Brinch Hansen 1971): short ones end soon, one sample does not wait behind
    4,096, and these, as they age, not for ever behind a stream of single ones. A request is split into parts of
    `part_rows`, begun one after another. A ticket that is cancelled frees its rows before the next call.
    parallel: whether a request that is alone, of few samples, runs in parallel in time until others come
    (`sampling/samplers/parallel.py`); equal to the other way to `parallel.TOLERANCE`.
    batch_sizes: sizes to pad up to, for a network compiled for these; none by default.
    observe: called in the batcher's thread as (rows, seconds) after each call of the network.
    choose: called before each with the `adapter` of each row's request; rows of one are next to each other.

    `start()` (or `with`) runs it in a thread of its own, until `close()`; else `step()` makes one call at a time.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        max_batch: int = 32,
        *,
        part_rows: int | None = None,
        parallel: bool = False,
        batch_sizes: Sequence[int] = (),
        device: torch.device | str = "cpu",
        observe: Callable[[int, float], None] | None = None,
        choose: Callable[[list[str]], None] | None = None,
    ) -> None:
        if max_batch < 2:
            raise UserError(f"max_batch = {max_batch}: must be 2 or more, guidance takes two rows a sample")
        self.denoiser, self.max_batch, self.device = denoiser, max_batch, torch.device(device)
        self.part_rows = part_rows or max(1, max_batch // 8)
        if not 1 <= self.part_rows <= max_batch // 2:
            raise UserError(f"part_rows = {part_rows}: must be in [1, max_batch / 2 = {max_batch // 2}]")
        self.batch_sizes = sorted(batch_sizes)
        self._is_alone = self._alone if parallel else None
        self.calls = self.rows = 0
        self.seconds_per_call = 0.0
        self._observe, self._choose_adapters = observe, choose
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, request: SampleRequest, show: ShowEstimate | None = None) -> Ticket:
        """Queues a request. Raises UserError at once on bad arguments; a failure on the way is the ticket's."""
        return self.queue(self.ticket(request, show))

    def ticket(self, request: SampleRequest, show: ShowEstimate | None = None) -> Ticket:
        """A request's ticket, to `queue`. In parallel in time that is a dry run of its sampler, of milliseconds (50 of
        1,000 steps): not for an event loop's thread."""
        return Ticket(request, self.part_rows, self.max_batch, self.device, show, self._is_alone)

    def queue(self, ticket: Ticket) -> Ticket:
        """Queues a ticket of this batcher. Raises BatcherStopped."""
        ticket.arrived, ticket.submitted = self.calls, time.monotonic()
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

    def _alone(self, ticket: Ticket) -> bool:
        with self._changed:
            return all(other is ticket or other.done() for other in self._tickets)

    def _choose(self) -> list[Part]:
        """The parts of the next call, all of one sample shape; rotates the requests, so each is first in its turn."""
        while True:
            self._tickets = deque(ticket for ticket in self._tickets if not ticket.done())
            if not self._tickets:
                return []
            self._tickets.rotate(-1)
            first = self._tickets[-1]
            shape = first.request.shape
            same = [first, *(ticket for ticket in list(self._tickets)[:-1] if ticket.request.shape == shape)]
            chosen: list[Part] = []
            room, turns = self.max_batch, self.max_batch // IN_TURN
            for ticket in same:
                if self.max_batch - room >= turns:
                    break
                room -= ticket.take(max(1, turns // len(same)), room, chosen)
            for ticket in sorted(same, key=lambda ticket: ticket.response_ratio(self.calls), reverse=True):
                room -= ticket.take(room, room, chosen) if room else 0
            if chosen:
                return sorted(chosen, key=lambda part: part.ticket.request.adapter)

    def _denoise(self, parts: list[Part]) -> list[Tensor | Exception]:
        """The denoised rows of each part from one call; if it fails, each part's own call finds who is at fault."""
        try:
            return list(self._call(parts))
        except Exception as error:
            if len(parts) == 1:
                return [error]
        return [self._denoise([part])[0] for part in parts]

    def _call(self, parts: list[Part]) -> Sequence[Tensor]:
        x = torch.cat([part.x for part in parts])
        sigma = torch.cat([per_row(part.sigma, part.x) for part in parts])
        count = len(x)
        condition = Condition.cat([part.encoded(self.denoiser) for part in parts], [len(part.x) for part in parts])
        if self._choose_adapters is not None:
            self._choose_adapters([part.ticket.request.adapter for part in parts for _ in part.x])
        padded = next((size for size in self.batch_sizes if size >= count), count)
        if padded > count:
            x, sigma = _pad(x, padded), _pad(sigma, padded)
            condition = None if condition is None else condition.fill(padded)
        denoised = self.denoiser(x, sigma) if condition is None else self.denoiser(x, sigma, condition)
        if denoised.shape != x.shape or denoised.dtype != x.dtype:
            raise ScorerayError(
                f"the denoiser gave {list(denoised.shape)} {denoised.dtype} for {list(x.shape)} {x.dtype}"
            )
        self.calls += 1
        self.rows += count
        return denoised[:count].split([len(part.x) for part in parts])


def _pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])])
