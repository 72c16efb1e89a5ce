"""A loaded denoiser made fast for drawing: bf16 weights and a compiled, frozen forward, where that is exact enough.

How exact is measured, not assumed: the same seeds are drawn both ways, and the root mean square difference of the
samples, in units of sigma_data, must stay under TOLERANCE for `auto` to take it.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError, nearest
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, Conditions, as_condition, encoded
from scoreray.trainer.diffusion.condition_shapes import complete, example_condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.engine.cpu import has_bf16_units

log = logging.getLogger("scoreray.serve")

PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")
TOLERANCE = 0.05
PROBE_SAMPLES, PROBE_STEPS = 4, 12
MIN_PARAMETERS = 100_000  # a smaller network's call is short whatever is done, and not worth a compiler's minute


@dataclass(frozen=True)
class Fast:
    """A denoiser to call, what it is ("fp32", "bf16, compiled"), and how far its samples are from fp32's."""

    denoiser: Denoiser
    name: str
    difference: float = 0.0
    seconds: float = 0.0


def check_choices(precision: str, compile_: str) -> None:
    """Raises UserError on a word that is none of PRECISIONS or COMPILE."""
    for name, value, accepted in (("precision", precision, PRECISIONS), ("compile", compile_, COMPILE)):
        if value not in accepted:
            raise UserError(f"{name} = {value!r}: {nearest(value, accepted)}")


def make_fast(
    denoiser: LoadedDenoiser,
    max_batch: int,
    *,
    precision: str = "auto",
    compile_: str = "auto",
    limit_s: float = 120.0,
    sizes: Sequence[int] = (),
    pad_always: bool = True,
) -> Fast:
    """The form of `denoiser` that these words ask for, warmed up at `max_batch`.

    sizes: batches to compile for beside `max_batch`, which comes first; others are padded to the next. A fixed size
    compiles in a fifth of the time and runs 1.5 times as fast as a forward for any size (measured on a CPU).
    pad_always: else only where it was measured to be quicker than uncompiled, and rounding may depend on the clock.

    precision: fp32, bf16, or auto: bf16 on a GPU or CPU that has units for it, where it is exact enough. compile: on,
    off, or auto: on where there is a compiler and the network is not tiny. Sizes that are not compiled within `limit_s`
    are left out by `auto`; what can't be compiled at all is an error of `on`.
    """
    check_choices(precision, compile_)
    started = time.monotonic()
    device = next(denoiser.parameters()).device
    tiny = sum(p.numel() for p in denoiser.parameters()) < MIN_PARAMETERS
    wants_bf16 = precision == "bf16" or (precision == "auto" and not tiny and has_bf16_units(device))
    wants_compile = compile_ == "on" or (compile_ == "auto" and not tiny and has_compiler(device))
    if denoiser.readout is not None:  # an energy's gradient is taken inside the call
        wants_bf16, wants_compile = precision == "bf16", compile_ == "on"
    fast: Denoiser = denoiser
    name, difference = "fp32", 0.0
    if wants_bf16:
        lower = copy.deepcopy(denoiser).to(torch.bfloat16)
        difference = distance(denoiser, lower)
        if precision == "bf16" or difference <= TOLERANCE:
            fast, name = lower, "bf16"
        else:
            log.warning("bf16 is %.3f sigma_data away from fp32 (at most %.3f): fp32 is used", difference, TOLERANCE)
            difference = 0.0
    if wants_compile:
        wanted = sorted({max_batch, *sizes}, reverse=True)
        compiled = _compiled(fast, denoiser, wanted, math.inf if compile_ == "on" else limit_s)
        if compiled is not None:
            moved = distance(denoiser, compiled)
            if compile_ == "on" or moved <= TOLERANCE:
                if not pad_always:
                    _measure_padding(compiled, fast, denoiser)
                fast, name, difference = compiled, f"{name}, compiled", moved
    _warm(fast, denoiser, max_batch)
    return Fast(fast, name, difference, time.monotonic() - started)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can make kernels for this device."""
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def distance(exact: LoadedDenoiser, other: Callable[..., Tensor]) -> float:
    """RMS difference of the same seeds drawn by either (Heun), in units of sigma_data; infinite where it fails."""
    info, device = exact.info, next(exact.parameters()).device
    sigmas = info.sigmas(PROBE_STEPS)
    noise = SampleNoise(range(PROBE_SAMPLES)).normal((PROBE_SAMPLES, *info.image_shape), torch.float32, device)
    given = example_condition(info.conditions, PROBE_SAMPLES, device)
    x = noise * float(sigmas[0])
    a, b = (sample(d, x, sigmas, generator=range(PROBE_SAMPLES), condition=given) for d in (exact, other))
    return float((a - b).square().mean().sqrt()) / exact.sigma_data


class Sized(nn.Module):
    """A compiled network for batches of some sizes: others are padded to the next one, larger ones run uncompiled, and
    so do samples of another `shape` (of a model of data in buckets).

    least: of a size, the rows from which on padding to it is quicker than running uncompiled; 1 where it is not known.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.network, self.sizes, self.least = network, list[int](), dict[int, int]()
        self.conditions: Conditions = getattr(network, "conditions", {})
        self._compiled = torch.compile(network, dynamic=False, options={"freezing": True})

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.network, condition)

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        size = min((size for size in self.sizes if size >= len(x)), default=None)
        if size is None or tuple(x.shape[1:]) != self.shape or len(x) < self.least.get(size, 1):
            return self.network(x, c_noise, condition)
        given = as_condition(condition, self.conditions)
        if self.conditions:  # one graph only, which reads no text: samplers have it read before their first step
            given = self.encode(complete(given, self.conditions, len(x), x.device)).fill(size)
        padding = size - len(x)
        if padding:
            x, c_noise = (torch.cat([t, t[-1:].expand(padding, *t.shape[1:])]) for t in (x, c_noise))
        return self._compiled(x, c_noise, given)[: size - padding]


def _compiled(denoiser: Denoiser, loaded: LoadedDenoiser, sizes: Sequence[int], limit_s: float) -> Denoiser | None:
    """`denoiser` with its network compiled for those of `sizes` that are ready within `limit_s`; None for none of them.

    Raises UserError where it can't be compiled and `limit_s` is infinite.
    """
    assert isinstance(denoiser.network, nn.Module)
    sized = Sized(copy.deepcopy(denoiser.network), loaded.info.image_shape).eval()
    fast = Denoiser(sized, denoiser.parameterization, denoiser.sigma_data).eval()
    failures: list[Exception] = []
    deadline = time.monotonic() + limit_s

    def compile_() -> None:
        trial = copy.copy(sized)  # so that no size is used before it is ready
        trial_denoiser = Denoiser(trial, denoiser.parameterization, denoiser.sigma_data).eval()
        try:
            for size in sizes:
                trial.sizes = [size]
                _warm(trial_denoiser, loaded, size)
                if time.monotonic() > deadline:
                    return
                sized.sizes.append(size)
        except Exception as error:
            failures.append(error)

    compiling = threading.Thread(target=compile_, name="compile", daemon=True)  # a compiler can't be interrupted
    compiling.start()
    compiling.join(None if limit_s == math.inf else limit_s)
    if failures:
        what = f"{type(failures[0]).__name__}: {str(failures[0]).splitlines()[0]}"
        if limit_s == math.inf:
            raise UserError(f"compile = 'on': {what}") from failures[0]
        log.warning("the network can't be compiled: %s", what)
    if len(sized.sizes) < len(sizes):
        log.warning("compiled for batches of %s within %.0f s, not of %s", sized.sizes, limit_s, list(sizes))
    return fast if sized.sizes else None


def _measure_padding(compiled: Denoiser, uncompiled: Denoiser, loaded: LoadedDenoiser) -> None:
    """Finds, for each compiled size, how few rows are still quicker padded to it than as they are uncompiled.

    On a CPU that is about half the size, as time grows with rows; on a GPU, where launching takes it, nearly none.
    """
    assert isinstance(compiled.network, Sized)
    for size in compiled.network.sizes:
        padded_s, rows = _seconds(compiled, loaded, size), size
        while rows > 1 and _seconds(uncompiled, loaded, rows // 2) >= padded_s:
            rows //= 2
        compiled.network.least[size] = rows


def _seconds(denoiser: Callable[..., Tensor], loaded: LoadedDenoiser, size: int) -> float:
    """Of one call at a size: the best of a few."""
    found = []
    for _ in range(4):
        started = time.perf_counter()
        _warm(denoiser, loaded, size)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def _warm(denoiser: Callable[..., Tensor], loaded: LoadedDenoiser, size: int) -> None:
    """Calls it once at a size, with the conditions that it takes."""
    info, device = loaded.info, next(loaded.parameters()).device
    x, sigma = torch.zeros(size, *info.image_shape, device=device), torch.ones(size, device=device)
    with torch.no_grad():
        denoiser(x, sigma, example_condition(info.conditions, size, device))
