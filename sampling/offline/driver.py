"""The offline driver's network calls: batches of one shape, in the precision and form that pay for the work at hand.

On a CPU every call has exactly ROWS rows, the last ones padded: kernels are chosen by shape, so a sample then has the
same bits whatever the batch size, its place in a batch, or who drew it. Where the place matters, calls have one row.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import guidance_terms
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.fast import check_choices, make_fast
from scoreray.sampling.model.load import LoadedDenoiser, LoadedMachine, SampledModel
from scoreray.sampling.model.text_encoding import read_texts
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import ADAPTIVE
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, as_condition
from scoreray.trainer.diffusion.condition_shapes import complete, example_condition

log = logging.getLogger(__name__)

ROWS = 16  # enough rows to fill a CPU's matrix kernels; a smaller batch costs as much per call, a larger one more
COMPILE_S = 60.0  # what compiling a small U-Net takes on one busy core (measured: 10 to 60 s)
COMPILED_BEFORE_S = 20.0  # with Inductor's kernels in its cache only the tracing is left
SAVED = 0.5  # of an fp32, eager call's time by the fast form (measured: 0.5 to 0.75)
STEADY_PROBES = 4
ADAPTIVE_CALLS = 100  # of an adaptive sampler, about


@dataclass(frozen=True)
class Form:
    """How a network is called: precision fp32 or bf16, compiled or not, and the rows of a call (None: any)."""

    precision: str = "fp32"
    compiled: bool = False
    rows: int | None = ROWS

    @property
    def name(self) -> str:
        return self.precision + (", compiled" if self.compiled else "")


class InRows(LoadedDenoiser):
    """A loaded denoiser whose network is always called with `rows` rows, the last ones repeated to fill them up, and
    with conditions of the greatest length."""

    rows: int

    def forward(
        self, x: Tensor, sigma: Tensor | float, condition: AnyCondition = None, *, class_labels: Tensor | None = None
    ) -> Tensor:
        condition = as_condition(class_labels if condition is None else condition, self.info.network_conditions)
        if condition is not None:
            condition = complete(condition, self.info.network_conditions, len(x))
        if len(x) == self.rows:
            return super().forward(x, sigma, condition)
        if not isinstance(sigma, Tensor):
            sigma = x.new_full((len(x),), sigma)
        parts = []
        for rows in self._parts(len(x)):
            given = None if condition is None else condition[rows].fill(self.rows)
            part = super().forward(self._filled(x[rows]), self._filled(sigma[rows]), given)
            parts.append(part[: len(x[rows])])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def encode(self, condition: Condition) -> Condition:
        condition = read_texts(condition, self.info.conditions)
        if not any(spec.kind == "text" for spec in self.info.conditions.values()):
            return condition
        given = complete(condition, self.info.network_conditions, len(condition))
        parts = [super(InRows, self).encode(given[rows].fill(self.rows)) for rows in self._parts(len(given))]
        found = Condition.cat(parts, [self.rows] * len(parts))
        assert found is not None
        return found[: len(condition)]

    def _parts(self, rows: int) -> list[slice]:
        return [slice(first, first + self.rows) for first in range(0, rows, self.rows)]

    def _filled(self, values: Tensor) -> Tensor:
        missing = self.rows - len(values)
        return values if not missing else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


def steady_rows(model: LoadedDenoiser, rows: int) -> int:
    """`rows`, or 1 where a call of so many gives a row other bits at another place in it.

    A CPU computes exp() of whole vectors and of what is left over by different routines, so the place matters where a
    row's activations fill no whole vectors (seen: an MLP of width 37, and none of U-Nets, DiTs and widths of 16 n).
    """
    device, info = _device(model), model.info
    noise = SampleNoise(range(STEADY_PROBES)).normal((STEADY_PROBES, *info.image_shape), torch.float32, device)
    sigmas = torch.logspace(-2, 1, STEADY_PROBES, device=device)
    given = example_condition(info.conditions, STEADY_PROBES, device)
    with torch.no_grad():
        for i in range(STEADY_PROBES):
            x = ((model.sigma_data + sigmas[i]) * noise[i]).expand(rows, *info.image_shape)
            denoised = model(x, sigmas[i].expand(rows), None if given is None else given[i : i + 1].expand(rows))
            if not bool((denoised == denoised[:1]).all()):
                return 1
    return rows


def in_form(model: SampledModel, form: Form) -> SampledModel:
    """`model` as `form` says; the same for every process that draws a part of one job. Raises UserError."""
    if isinstance(model, LoadedMachine) or form.rows is None:
        return model
    fast = model if form == Form(rows=form.rows) else _fast(model, form)
    driven = InRows(fast.network, fast.parameterization, fast.sigma_data)
    driven.rows, driven.info = form.rows, model.info
    return driven.eval()


def in_same_rows(model: LoadedDenoiser, max_batch: int) -> LoadedDenoiser:
    """`model` such that a sample's bits don't depend on which others share its calls, of up to `max_batch` rows.

    Fewer rows a call cost less where one sample is drawn alone, more where many are: on a CPU a quarter of `max_batch`
    is taken, on a GPU, where launching takes the time, all of it.
    """
    wanted = max(1, max_batch // 4) if _device(model).type == "cpu" else max_batch
    return in_form(model, Form(rows=steady_rows(model, wanted)))  # type: ignore[return-value]


def _fast(model: LoadedDenoiser, form: Form) -> Any:
    made = make_fast(
        model, form.rows or ROWS, precision=form.precision, compile_="on" if form.compiled else "off", limit_s=math.inf
    )
    if form.compiled:
        _remember(model.info)
    return made.denoiser


def choose_form(
    model: SampledModel,
    request: Request,
    *,
    precision: str,
    compile_: str,
    processes: int = 1,
    report: Callable[[str], None] = lambda what: None,
) -> Form:
    """What `precision` and `compile_` (auto, ...) mean for this request.

    auto: bf16 weights and a compiled forward where the network's calls, by the time of one, pay for compiling, and
    where `fast.make_fast` finds the samples close enough; else fp32 as it is. Raises UserError for an unknown value.
    """
    check_choices(precision, compile_)
    if isinstance(model, LoadedMachine):
        if precision == "bf16" or compile_ == "on":
            raise UserError("--precision bf16 and --compile on: a Gibbs chain has no network to call; leave them out")
        return Form(rows=None)
    rows = steady_rows(model, ROWS) if _device(model).type == "cpu" else request.batch_size
    exact = Form("fp32" if precision == "auto" else precision, compile_ == "on", rows)
    if request.measurement is not None or "auto" not in (precision, compile_):
        return exact
    if compile_ == "auto" and not _pays(model, request, rows, processes):
        return exact
    what = "trying bf16" if compile_ == "off" else "compiling the network"
    report(f"{what}, and comparing its samples with exact ones")
    made = make_fast(model, rows, precision=precision, compile_=compile_)
    chosen = Form("bf16" if made.name.startswith("bf16") else "fp32", "compiled" in made.name, rows)
    if chosen.compiled:
        _remember(model.info)
    return chosen


def network_calls(request: Request, info: ModelInfo, rows: int) -> int:
    """Calls of the network, of `rows` rows each, that a request takes in all, about."""
    calls = ADAPTIVE_CALLS if request.sampler in ADAPTIVE else request.calls(info)
    guided = 1
    if info.guidance_range is None:
        guided = len(guidance_terms(request.guided.weight, info.conditions, request.guided.weights)) or 1
    return calls * guided * math.ceil(request.count / rows)


def _pays(model: LoadedDenoiser, request: Request, rows: int, processes: int) -> bool:
    calls = network_calls(request, model.info, rows) / processes
    saved_s = SAVED * calls * call_s(model, rows)
    return saved_s > (COMPILED_BEFORE_S if _marker(model.info).exists() else COMPILE_S)


def call_s(model: LoadedDenoiser, rows: int) -> float:
    """Seconds of one call of the network as it is, the quicker of two after a first one."""
    device = _device(model)
    x, sigma = torch.zeros(rows, *model.info.image_shape, device=device), torch.ones(rows, device=device)
    given = example_condition(model.info.conditions, rows, device)
    times = []
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            float(model(x, sigma, given).sum())  # waits for a GPU too
            times.append(time.perf_counter() - began)
    return min(times[1:])


def fingerprint(model: SampledModel) -> str:
    """SHA-256 of the weights, so that every process of a job draws from the same ones."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _marker(info: ModelInfo) -> Path:
    """A file beside Inductor's cache, there once a network like this was compiled on this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid_{os.getuid()}"
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{user}")
    network = (repr(info.config.network), info.image_shape, dict(info.network_conditions))
    parts: Sequence[object] = (torch.__version__, *network)
    return Path(cache, "scoreray-" + hashlib.sha256(json.dumps(list(map(str, parts))).encode()).hexdigest()[:16])


def _remember(info: ModelInfo) -> None:
    try:
        _marker(info).touch()
    except OSError as error:
        log.debug("the compiler's cache can't be marked: %s", error)


def _device(model: LoadedDenoiser) -> torch.device:
    return next(model.parameters()).device
