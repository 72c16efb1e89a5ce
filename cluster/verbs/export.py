"""`scoreray export`: a checkpoint's averages as models for inference, those that were not tracked made on Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from scoreray.cluster.actors import Retries, completed
from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.display import counted, say
from scoreray.data.errors import UserError
from scoreray.sampling.model.describe import Description, describe
from scoreray.sampling.model.export import export
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.posthoc import Mix, find_mix, in_turn, reconstruct
from scoreray.trainer.optim.ema import choose_length, is_power_length, length_name

RETRIES = Retries(
    times=3, work="averaging a range of parameters", hint="is there memory for it? set RAY_ADDRESS to a larger cluster"
)
ON_RAY_FROM_BYTES = 2 << 30  # of stored averages; below, starting Ray takes longer than mixing them here


def export_model(url: str, out: str, lengths: Sequence[str] = ()) -> dict[str, Any]:
    """Export a committed checkpoint (see `sampling/model/export.py`); a length that was not tracked is reconstructed.

    Ranges of parameters are mixed as Ray tasks where RAY_ADDRESS names a cluster or there is much to read.
    """
    found = describe(url)
    checkpoint = found.stored.source
    if not isinstance(checkpoint, Checkpoint):
        raise UserError(f"{url}: is an exported model already; give a run or a checkpoint, or copy its folder")
    names = [_name(found, length) for length in lengths]
    mixes = {}
    for name in names:
        if name not in found.stored.lengths:
            mixes[name] = find_mix(checkpoint, float(name))
            stored = len(mixes[name].parts)
            say(f"EMA {name}: made of the averages of {stored} steps, to {mixes[name].residual:.2%} of its profile")
    with _tasks(mixes.values()) as each:
        states = {name: partial(reconstruct, checkpoint, mix, each) for name, mix in mixes.items()}
        page = export(checkpoint, out, names, states=states)
    return {**page, "residuals": {name: mix.residual for name, mix in mixes.items()}}


def _name(found: Description, length: str) -> str:
    """The length that is meant: one that is stored, or any number, of which an average can be made."""
    name = length_name(length, found.info.config.ema.stds)
    return name if is_power_length(name) else choose_length(name, found.stored.lengths, found.info.url)


@contextlib.contextmanager
def _tasks(mixes: Iterable[Mix]) -> Iterator[Callable[..., Any]]:
    """How to call a task for each of many inputs: in this process, or on Ray."""
    num_bytes = sum(about.bytes for mix in mixes for stored, _ in mix.parts for about in stored.marker.files.values())
    if not num_bytes or ("RAY_ADDRESS" not in os.environ and num_bytes < ON_RAY_FROM_BYTES):
        yield in_turn
        return
    with connected():
        yield on_ray


def on_ray(task: Callable[..., Any], inputs: Iterable[tuple]) -> Iterator[Any]:
    """The task's results, each called as a Ray task, in the order in which they are done."""
    import ray

    remote = ray.remote(num_cpus=1, max_retries=RETRIES.times)(task)
    ranges = list(inputs)  # all are Ray's to schedule at once: it holds back what has no CPU yet
    with counted("average", "parts") as progress:
        calls = [lambda arguments: remote.remote(*arguments)] * len(ranges)
        for done, (_, result) in enumerate(completed(calls, ranges, RETRIES), 1):
            yield result
            progress(done, len(ranges))
