"""A request in the step batcher: its ticket, and the parts of it that the batcher works on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import (
    Terms,
    check_negative,
    classifier_free_steps,
    guidance_terms,
    term_rows,
)
from scoreray.sampling.samplers.noise import Acceptance, SampleNoise
from scoreray.sampling.samplers.ode import DenoiserCall, Steps
from scoreray.sampling.samplers.parallel import MOST_CALLS, PARALLEL, Parallel
from scoreray.sampling.samplers.sample import check_rows, start
from scoreray.sampling.samplers.sigmas import as_grid
from scoreray.sampling.service.request import SampleRequest
from scoreray.trainer.diffusion.condition import Condition, encoded, tiled
from scoreray.trainer.diffusion.levels import GUIDANCE_WEIGHT, with_target_level

ShowEstimate = Callable[[int, float | Tensor, Tensor], None]
"""Called in the batcher's thread after each call of the network: (first row, sigma, denoised [b, *shape])."""


class NonFiniteSamplesError(UserError):
    """The samples of a request are NaN or infinite: its options are too strong."""


def terms_of(request: SampleRequest) -> Terms:
    """The estimates that the guidance of a request adds up: each takes a row of the network's calls for each sample.

    Raises UserError where guidance, or a negative prompt, has no condition to act on.
    """
    if request.condition is None:
        if request.guidance != 1 or request.weights or request.negative is not None:
            raise UserError("guidance needs a condition: give one, with a row for each sample")
        return guidance_terms(1, ())
    if GUIDANCE_WEIGHT in request.condition.values:  # an input of the network
        if request.negative is not None:
            raise UserError("a negative prompt needs guidance of several calls, which this model has learned in one")
        return guidance_terms(1, ())
    terms = guidance_terms(request.guidance, request.condition.values, request.weights)
    if request.negative is not None:
        check_negative(request.negative.values, terms)
    return terms


class Ticket(Future[Tensor]):
    """A request in the batcher: the samples to come, [len(seeds), *shape], the parts that run and the rows not begun.

    `.result(timeout)` in a thread, `await` in asyncio, `.cancel()`. queued_s: how long the request waited for its first
    call of the network, once that has come. rows: that the network was called with for it so far, those of guidance
    included. parallel: whether steps of a sample shared calls so far. The rest is the batcher's.

    is_alone: whether no other request waits, called before each call of the network: it may then run in parallel in
    time, in half of the network's rows, so that one that comes has the others at once. None: never.
    """

    def __init__(
        self,
        request: SampleRequest,
        part_rows: int,
        max_batch: int,
        device: torch.device,
        show: ShowEstimate | None,
        is_alone: Callable[[Ticket], bool] | None = None,
    ) -> None:
        super().__init__()
        self.request, self.device, self.show = request, device, show
        self.terms = terms_of(request)
        if len(self.terms) > max_batch:
            raise UserError(
                f"guidance of {len(self.terms)} terms: each takes a row of a call, of {max_batch} at most; give fewer "
                "conditions a weight of their own"
            )
        self.part_rows = min(part_rows, max_batch // len(self.terms))
        self.most_parts = max_batch // self.part_rows
        self.queued_s: float | None = None
        self.rows = 0
        self.parallel = False
        self._is_alone, self._half_batch = is_alone, max_batch // 2
        self.acceptance = Acceptance()  # of all parts
        if len(request.seeds) < 1:
            raise UserError("a request for no samples: give at least one seed")
        self.seeds = SampleNoise(request.seeds).seeds
        self.sigmas = as_grid(request.sigmas)
        self.remaining, self.begun = len(self.seeds), 0
        self.submitted, self.arrived = time.monotonic(), 0
        self.work = self.remaining * len(self.terms) * request.expected_calls
        check_rows(request.condition, self.remaining)
        check_rows(request.negative, 1)
        self.parts: list[Part] = []
        self.samples: dict[int, Tensor] = {}
        self._begin()  # finds a bad sampler or option before the request is queued

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.wrap_future(self).__await__()

    def response_ratio(self, calls: int) -> float:
        """Calls of the network since it came, for each row that it is still expected to take of them."""
        return (calls - self.arrived + 1) / max(self.work, self.remaining)

    def take(self, share: int, room: int, chosen: list[Part]) -> int:
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
        self.rows += taken
        self.work -= taken
        return taken

    def _waiting(self) -> Iterator[Part]:
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

    def _begin(self) -> Part | None:
        """Starts the sampler of the next rows; None where all have begun."""
        if self.begun >= len(self.seeds) or self.done():
            return None
        rows = slice(self.begun, self.begun + self.part_rows)
        noise = SampleNoise(self.seeds[rows], acceptance=self.acceptance)
        x = noise.normal((len(noise.seeds), *self.request.shape), torch.float32, self.device)
        x = x * float(self.sigmas[0])
        steps = start(self.request.sampler, x, self.sigmas, noise, parallel=self._in_time(), **self.request.options)
        condition = self.request.condition
        part = Part(self, self.begun, steps, None if condition is None else condition[rows].to(self.device))
        self.begun += len(x)
        self.parts.append(part)
        return part

    def _in_time(self) -> Parallel | None:
        """Parallel in time where it may be and is of use now; a part that begins beside others goes step by step."""
        known = self.request.sampler in PARALLEL and self.request.expected_calls <= MOST_CALLS
        return Parallel(limit=self._states) if known and self._states(2) > 1 else None

    def _states(self, wanted: int) -> int:
        """How many states of each sample the next call of a part may hold, of so many."""
        if self._is_alone is None or not self._is_alone(self):
            return 1
        return min(wanted, self._half_batch // (len(self.terms) * self.remaining))

    def finish(self, part: Part, samples: Tensor) -> None:
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


class Part:
    """Some rows of a request: their sampler's generator, and the network call that it waits for."""

    def __init__(self, ticket: Ticket, first: int, steps: Steps, condition: Condition | None) -> None:
        self.ticket, self.first, self.in_call, self.calls = ticket, first, False, 0
        self._given, self._encoded = condition, False
        self.steps = classifier_free_steps(steps, ticket.terms) if len(ticket.terms) > 1 else steps
        with torch.no_grad():
            self.x, self.sigma, self.target, self.copies = DenoiserCall(*next(self.steps))

    def encoded(self, denoiser: Callable[..., Tensor]) -> Condition | None:
        """What conditions a call's rows, of all terms of guidance, and the level that a flow map is to reach. Texts are
        read once for all calls."""
        if not self._encoded and self._given is not None:
            negative = self.ticket.request.negative
            instead = None if negative is None else encoded(denoiser, negative.to(self.ticket.device))
            self._given = term_rows(encoded(denoiser, self._given), self.ticket.terms, instead)
        self._encoded = True
        given = tiled(self._given, self.copies)
        return given if self.target is None else with_target_level(given, self.target, self.x)

    def advance(self, denoised: Tensor | Exception) -> None:
        """Takes what the network gave: on to the next wait, to the end, or to the request's failure."""
        self.in_call = False
        if isinstance(denoised, Exception):
            self.ticket.fail(denoised)
            return
        self.calls += 1
        self.ticket.parallel |= self.copies > 1
        request = self.ticket.request
        try:
            if request.calls_limit is not None and self.calls > request.calls_limit:
                raise UserError(
                    f"sampler '{request.sampler}' needed more than {request.calls_limit} calls of the network for a "
                    "sample: take fewer steps or looser tolerances"
                )
            if self.ticket.show is not None:
                rows = len(denoised) // (len(self.ticket.terms) * self.copies)
                self.ticket.show(self.first, self.sigma, denoised[:rows])
            self.x, self.sigma, self.target, self.copies = DenoiserCall(*self.steps.send(denoised))
        except StopIteration as end:
            self.ticket.finish(self, end.value)
        except Exception as error:
            self.ticket.fail(error)


def _settle(set_: Callable[[Any], None], value: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled while its last rows were on their way
        set_(value)
