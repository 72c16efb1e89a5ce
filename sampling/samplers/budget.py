"""Which sampler draws best within a budget of network calls a sample, and how many steps of it fit.

Guidance costs rows and not calls: a call has two rows or more for each sample then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

LARGEST_BUDGET = 10_000  # calls a sample: fitting steps are found by dry runs, which take milliseconds up to here
UNIPC_FROM = 13  # calls
ENOUGH_CALLS = 40


def solver_within(max_calls: int) -> tuple[str, str]:
    """The solver of the probability-flow ODE with the smallest error at so many calls, and the grid for it.

    Measured (benchmarks/RESULTS.md) on mixtures of Gaussians with exact denoisers and on a network that was trained on
    8 x 8 digits. Multistep solvers, a call a step, err less than heun and dpm2 at every budget up to 100 calls: 5 to 8
    times less at 20. At fewer than UNIPC_FROM calls dpmpp_2m is as good as unipc or better, with more unipc is. Karras'
    grid spends a call at the smallest level, where little is left to do: without it (`interior`) the error is a half at
    7 calls, 0.7 of it at 13 and the same at 40.
    """
    return "dpmpp_2m" if max_calls < UNIPC_FROM else "unipc", "interior"


def calls_worth_taking(max_calls: int) -> int:
    """What a budget is spent on where the sampler is ours to choose: beyond ENOUGH_CALLS samples hardly change.

    There unipc's error is about 0.0015 for data of standard deviation 0.5 to 0.75; a step of 8-bit grey is 0.008.
    """
    return min(max_calls, ENOUGH_CALLS)


def most_steps(max_calls: int, calls: Callable[[int], int]) -> int:
    """The most steps that take at most `max_calls` calls, 0 where one takes more; a step takes a call at least.

    calls: how many a number of steps takes; it never falls as steps are added.
    """
    return bisect_right(range(1, max_calls + 1), max_calls, key=calls)
