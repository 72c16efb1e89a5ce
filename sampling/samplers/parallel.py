"""Parallel in time: several steps of one sampler in one call of the network, for latency where few samples are drawn.

A sampler's states are linear in its first state, the denoised batches before them and its random numbers (the samplers
of PARALLEL; coefficients depend on the grid alone). So from guesses of the next denoised batches follow guesses of the
next states, with the linear part of the sampler exact; one call denoises them together, several states of each sample
in its batch (Picard iteration with a sliding window: Shih 2023, "Parallel sampling of diffusion models", ParaDiGMS).

The sampler itself then goes on with what came back for as long as the state that it arrives at is the one that was
guessed, to `tolerance` times its noise level (root mean square, the worst sample of the batch), and the window slides
there. The first state of a window is the sampler's own, so that every call is at least one step of it; what was
denoised beyond is the next call's guess, and new states are guessed by a line through the last denoised batches, in
the logarithm of the noise level. What comes out is the sampler's own arithmetic on batches that were each denoised
within the tolerance of their state: with tolerance 0 the same bits as without, where rows don't depend on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.ode import DenoiserCall, Steps

PARALLEL = frozenset(
    {
        "euler",
        "heun",
        "dpm2",
        "dpmpp_2m",
        "unipc",
        "ddim",
        "ddpm",
        "reverse_sde",
        "edm_sde",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
    }
)
"""Samplers whose states are linear in the denoised batches, with coefficients that depend on the grid alone."""
MOST_CALLS = 1000  # of the network, sequentially: coefficients and denoised batches of all of them are kept
MOST_ROWS = 2.5  # times the rows that the sequential sampler takes, never more: what is left then goes step by step
MORE = 3  # states of a call beyond as many as the last one advanced; measured: more cost rows and gain no calls
WINDOW = 16
TOLERANCE = 0.005
FEW = 8  # samples at most that are drawn together; more fill calls of the network without it


def _always(window: int) -> int:
    return window


@dataclass(frozen=True)
class Parallel:
    """How a sampler runs in parallel in time.

    window: states of each sample in one call at most. tolerance: how far a state may be from the one that was denoised
    in its place, in its noise level. limit: called before each call with how many states it would hold; returns how
    many it may, 1 for the sampler's own step alone, so that others have the network's rows. Raises UserError.
    """

    window: int = WINDOW
    tolerance: float = TOLERANCE
    limit: Callable[[int], int] = _always

    def __post_init__(self) -> None:
        if not 2 <= self.window <= MOST_CALLS:
            raise UserError(
                f"parallel window {self.window}: must be in [2, {MOST_CALLS}], states of a sample in a call"
            )
        if not 0 <= self.tolerance <= 1:
            raise UserError(f"parallel tolerance {self.tolerance}: must be in [0, 1], in noise levels; 0 is exact")


def check_parallel(sampler: str) -> None:
    """Raises UserError where a sampler can't run in parallel in time."""
    if sampler not in PARALLEL:
        raise UserError(
            f"sampler '{sampler}' can't run in parallel in time, as its states are not known from the denoised batches "
            f"before them alone; choose one of {', '.join(sorted(PARALLEL))}"
        )


def in_parallel(make: Callable[[Tensor, Noise], Steps], x: Tensor, noise: Noise, parallel: Parallel) -> Steps:
    """The sampler that `make(x, noise)` begins, in parallel in time: it yields calls of up to `window` states of each
    sample. Raises UserError for one of more than MOST_CALLS calls."""
    plan = _plan(make)
    guesses = _Guesses(plan, x, noise)
    steps = make(x, guesses.numbers)
    state = next(steps)[0]
    first = advanced = 0  # the call whose state is the sampler's own, and steps that the last one made
    rows_left = math.floor(MOST_ROWS * plan.num_calls)  # of each sample
    while True:
        after = plan.num_calls - first - 1
        width = max(1, min(advanced + MORE, parallel.window, after + 1, rows_left - after))
        width = max(1, min(width, parallel.limit(width)))
        states = guesses.states(state, first, width)
        levels = states.new_tensor(plan.levels[first : first + width]).repeat_interleave(len(x))
        found = (yield DenoiserCall(states.flatten(0, 1), levels, copies=width)).unflatten(0, (width, len(x)))
        guesses.learn(first, states, found)
        rows_left, advanced = rows_left - width, 0
        for other, denoised in zip(states, found, strict=True):
            if advanced and not _near(state, other, parallel.tolerance * plan.levels[first]):
                break
            try:
                state = steps.send(denoised)[0]
            except StopIteration as end:
                return end.value
            first, advanced = first + 1, advanced + 1


class _Guesses:
    """The next states of a sampler, from what was denoised so far.

    A state that was denoised before, in the place of one that is now a little elsewhere, gives its estimate plus
    `slope` times the way: the secant of the last call, one number for all (a scalar Broyden step; Anderson mixing of
    depth 1 in ParaTAA, Tang 2024). Measured: it saves a fifth to a third of the calls.
    """

    def __init__(self, plan: _Plan, x: Tensor, noise: Noise) -> None:
        self._plan, self._x, self._coefficients = plan, x, plan.coefficients.to(x)
        self._terms = x.new_zeros(1 + plan.num_calls + plan.num_draws, x.numel())  # what all states are linear in
        self._terms[0] = x.flatten()
        self._denoised = self._terms[1 : 1 + plan.num_calls]
        self.numbers = _Ahead(noise, self._terms[1 + plan.num_calls :])
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # by call: the state that was denoised last, and its estimate
        self._slope = x.new_zeros(())

    def states(self, state: Tensor, first: int, width: int) -> Tensor:
        """[width, *x.shape] of the calls from `first` on, whose own is `state`."""
        self.numbers.reach(self._plan.draws[first + width - 1], self._x)
        found = [state.flatten()]
        for i in range(first, first + width - 1):
            if i in self._seen:
                before, denoised = self._seen[i]
                self._denoised[i] = denoised + self._slope * (found[-1] - before)
            else:
                self._plan.guess(self._denoised, i)
            found.append(self._coefficients[i + 1] @ self._terms)
        return torch.stack(found).view(width, *self._x.shape)

    def learn(self, first: int, states: Tensor, found: Tensor) -> None:
        """Takes what a call gave for `states`."""
        moved = turned = self._x.new_zeros(())
        for i, (state, denoised) in enumerate(zip(states.flatten(1), found.flatten(1), strict=True), first):
            if i in self._seen:
                way, change = (state - self._seen[i][0]) / self._plan.levels[i], denoised - self._seen[i][1]
                moved, turned = moved + way @ way, turned + way @ change / self._plan.levels[i]
            self._seen[i] = state, denoised
            self._denoised[i] = denoised
        self._seen = {i: seen for i, seen in self._seen.items() if i > first}
        if moved is not turned:
            self._slope = (turned / moved).clamp(0, 1).nan_to_num(0)


def _near(state: Tensor, other: Tensor, distance: float) -> bool:
    """Whether the root mean square of each row's difference is at most `distance`; not where it is NaN."""
    return bool((state - other).flatten(1).square().mean(1).sqrt().max() <= distance)


class _Ahead:
    """A sampler's random numbers, drawn before it takes them: row i of `drawn` is what it would have drawn i-th."""

    def __init__(self, noise: Noise, drawn: Tensor) -> None:
        self._noise, self._drawn = noise, drawn
        self._made = self._taken = 0

    def reach(self, count: int, x: Tensor) -> None:
        """Draws until there are `count`, of the shape of x."""
        while self._made < count:
            self._drawn[self._made] = self._noise.like(x).flatten()
            self._made += 1

    def like(self, x: Tensor) -> Tensor:
        self._taken += 1
        self.reach(self._taken, x)
        return self._drawn[self._taken - 1].view_as(x)


@dataclass(frozen=True)
class _Plan:
    """What a sampler does on its grid, whatever it samples.

    coefficients: float64 [calls, 1 + calls + draws], of each call's state in x, the denoised batches and the random
    numbers. levels: noise level of each call. draws: how many random numbers were drawn before each.
    """

    coefficients: Tensor
    levels: Sequence[float]
    draws: Sequence[int]
    num_draws: int

    @property
    def num_calls(self) -> int:
        return len(self.levels)

    def guess(self, denoised: Tensor, i: int) -> None:
        """Fills in the batch of call i from those before: on the line through the last one and the latest that is at
        least half as far from it as i is, in log noise level, so that errors grow little; 0 of the first."""
        if i == 0:
            return
        logs = [math.log(level) for level in self.levels[: i + 1]]
        ahead = logs[i - 1] - logs[i]
        base = next((j for j in range(i - 2, -1, -1) if logs[j] - logs[i - 1] >= ahead / 2), None)
        if ahead <= 0 or base is None:
            denoised[i] = denoised[i - 1]
        else:
            denoised[i] = torch.lerp(denoised[base], denoised[i - 1], 1 + ahead / (logs[base] - logs[i - 1]))


def _plan(make: Callable[[Tensor, Noise], Steps]) -> _Plan:
    """Coefficients of a sampler, from a run of it on unit vectors, one for each of x, denoised batches and draws."""
    levels, draws, num_draws = _counted(make)
    units = torch.eye(1 + len(levels) + num_draws, dtype=torch.float64)[..., None]
    steps = make(units[0], _Units(units[1 + len(levels) :]))
    states = [next(steps)[0]]
    for i in range(1, len(levels)):
        states.append(steps.send(units[i])[0])
    return _Plan(torch.stack(states)[..., 0], levels, draws, num_draws)


def _counted(make: Callable[[Tensor, Noise], Steps]) -> tuple[list[float], list[int], int]:
    """Noise levels of a sampler's calls, draws before each, and draws in all. Raises UserError where it is too long."""
    noise, x = _Units(), torch.zeros(1, 1)
    steps, levels, draws = make(x, noise), list[float](), list[int]()
    try:
        call = next(steps)
        while True:
            levels.append(float(call[1]))
            draws.append(noise.taken)
            if len(levels) > MOST_CALLS:
                raise UserError(f"parallel in time: of at most {MOST_CALLS} calls of the network; take fewer steps")
            call = steps.send(x)
    except StopIteration:
        return levels, draws, noise.taken


class _Units:
    """Given vectors as a sampler's random numbers, in turn; zeros where there are none."""

    def __init__(self, units: Tensor | None = None) -> None:
        self._units, self.taken = units, 0

    def like(self, x: Tensor) -> Tensor:
        self.taken += 1
        return torch.zeros_like(x) if self._units is None else self._units[self.taken - 1]
