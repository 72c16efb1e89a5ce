"""A loaded denoiser made fast for drawing: bf16 weights and a compiled, frozen forward, where that is exact enough.

How exact is measured, not assumed: the same seeds are drawn both ways, and the root mean square difference of the
samples, in units of sigma_data, must stay under TOLERANCE for `auto` to take it.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.data.errors import UserError, nearest
from scoreray.sampling.load import LoadedDenoiser
from scoreray.sampling.noise import SampleNoise
from scoreray.sampling.samplers import sample
from scoreray.trainer.denoiser import Denoiser

log = logging.getLogger("scoreray.serve")

PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")
TOLERANCE = 0.05
PROBE_SAMPLES, PROBE_STEPS = 4, 12
MIN_PARAMETERS = 100_000  # a smaller network's call is short whatever is done, and not worth a compiler's minute


@dataclass(frozen=True)
class Fast:
    """A denoiser to call, what it is ("fp32", "bf16, compiled"), the sizes to pad to, and how far it is from fp32."""

    denoiser: Callable[..., Tensor]
    name: str
    batch_sizes: tuple[int, ...] = ()
    difference: float = 0.0
    seconds: float = 0.0


def check_choices(precision: str, compile_: str) -> None:
    """Raises UserError on a word that is none of PRECISIONS or COMPILE."""
    for name, value, accepted in (("precision", precision, PRECISIONS), ("compile", compile_, COMPILE)):
        if value not in accepted:
            raise UserError(f"{name} = {value!r}: {nearest(value, accepted)}")


def make_fast(
    denoiser: LoadedDenoiser, max_batch: int, *, precision: str = "auto", compile_: str = "auto", limit_s: float = 120.0
) -> Fast:
    """The form of `denoiser` that these words ask for, warmed up at batches of 1 to `max_batch`.

    precision: fp32, bf16, or auto: bf16 on a GPU or CPU that has units for it, where it is exact enough. compile: on,
    off, or auto: on where there is a compiler and the network is not tiny. What took longer than `limit_s` to warm up,
    or failed to, is dropped by `auto` and an error otherwise.
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
        compiled = _compiled(fast, denoiser, max_batch, limit_s, must=compile_ == "on")
        if compiled is not None:
            moved = distance(denoiser, compiled)
            if compile_ == "on" or moved <= TOLERANCE:
                fast, name, difference = compiled, f"{name}, compiled", moved
    _warm(fast, denoiser, (1, max_batch))
    return Fast(fast, name, (), difference, time.monotonic() - started)


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 is quicker than fp32 there: any recent GPU; a CPU with AVX-512 BF16 or AMX."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can make kernels for this device."""
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def distance(exact: LoadedDenoiser, other: Callable[..., Tensor]) -> float:
    """RMS difference of the same seeds drawn by either (Heun), in units of sigma_data; infinite where it fails."""
    info, device = exact.info, next(exact.parameters()).device
    sigmas = info.sigmas(PROBE_STEPS)
    noise = SampleNoise(range(PROBE_SAMPLES)).normal((PROBE_SAMPLES, *info.image_shape), torch.float32, device)
    labels = torch.arange(PROBE_SAMPLES, device=device) % len(info.classes) if info.classes else None
    x = noise * float(sigmas[0])
    a, b = (sample(d, x, sigmas, generator=range(PROBE_SAMPLES), class_labels=labels) for d in (exact, other))
    return float((a - b).square().mean().sqrt()) / exact.sigma_data


def _compiled(
    denoiser: Denoiser, loaded: LoadedDenoiser, max_batch: int, limit_s: float, must: bool
) -> Denoiser | None:
    """`denoiser` with its network compiled for any batch size; None where that fails or takes longer than `limit_s`."""
    import torch._inductor.config as inductor

    network = copy.deepcopy(denoiser.network)
    fast = Denoiser(torch.compile(network, dynamic=True), denoiser.parameterization, denoiser.sigma_data).eval()
    failures: list[Exception] = []

    def compile_() -> None:
        try:
            with inductor.patch(freezing=True):
                _warm(fast, loaded, (2, max_batch, 3, 1))
        except Exception as error:
            failures.append(error)

    compiling = threading.Thread(target=compile_, name="compile", daemon=True)  # a compiler can't be interrupted
    compiling.start()
    compiling.join(None if must else limit_s)
    if compiling.is_alive():
        log.warning("compiling took more than %.0f s: the network is used as it is", limit_s)
        return None
    if failures:
        what = f"{type(failures[0]).__name__}: {str(failures[0]).splitlines()[0]}"
        if must:
            raise UserError(f"compile = 'on': {what}") from failures[0]
        log.warning("the network can't be compiled and is used as it is: %s", what)
        return None
    return fast


def _warm(denoiser: Callable[..., Tensor], loaded: LoadedDenoiser, sizes: tuple[int, ...]) -> None:
    """Calls it once at each size, with and without labels where there are classes."""
    info, device = loaded.info, next(loaded.parameters()).device
    with torch.no_grad():
        for size in sizes:
            x, sigma = torch.zeros(size, *info.image_shape, device=device), torch.ones(size, device=device)
            if info.classes:
                denoiser(x, sigma, torch.zeros(size, dtype=torch.int64, device=device))
            else:
                denoiser(x, sigma)
