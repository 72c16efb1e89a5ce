"""Which sampler draws best within a budget of network calls a sample, and how many steps of it fit.

Guidance costs rows and not calls: a call has two rows or more for each sample then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

LARGEST_BUDGET = 10_000  # calls a sample: fitting steps are found by dry runs, which take milliseconds up to here
UNIPC_FROM = 13  # calls
ENOUGH_CALLS = 40
FEW_CALLS = 4  # of a model of few steps, which was trained for one to four
ODE_FROM = 8  # calls, of a flow map, whose network is a plain denoiser too (assumption: no trained map was measured)


class BudgetChoice(NamedTuple):
    """What a budget is best spent on. sampler, grid: None for the model's own. most_calls: what is worth taking."""

    sampler: str | None
    grid: str | None
    most_calls: int


def best_within(max_calls: int, map_: str = "none") -> BudgetChoice:
    """The sampler and grid that err least at so many calls on a model of this `map` (`ModelInfo.map`).

    Measured (benchmarks/RESULTS.md) on mixtures of Gaussians with exact denoisers, a perceptron and a U-Net. Multistep
    solvers, a call a step, err less than heun at every budget up to 99 calls: 5 to 8 times less at 21. At fewer than
    UNIPC_FROM calls dpmpp_2m is as good as unipc or better, with more unipc is. Karras' grid spends a call at the
    smallest level, where little is left to do: without it (`interior`) mixtures' error is a third at 7 calls, a half at
    13 and 0.9 of it at 41. Beyond ENOUGH_CALLS samples hardly change: there the error is 0.001 to 0.002 for data of
    standard deviation 0.5 to 0.75, and a step of 8-bit grey is 0.008.
    """
    if map_ in ("consistency", "progressive") or (map_ == "flow_map" and max_calls < ODE_FROM):
        return BudgetChoice(None, None, min(max_calls, FEW_CALLS))
    return BudgetChoice("dpmpp_2m" if max_calls < UNIPC_FROM else "unipc", "interior", min(max_calls, ENOUGH_CALLS))


def most_steps(max_calls: int, calls: Callable[[int], int]) -> int:
    """The most steps that take at most `max_calls` calls, 0 where one takes more; a step takes a call at least.

    calls: how many a number of steps takes; it never falls as steps are added.
    """
    return bisect_right(range(1, max_calls + 1), max_calls, key=calls)
