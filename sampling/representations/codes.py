"""Codes of samples under a trained model, and the samples that codes are decoded to.

A denoiser's code is the noise that the probability-flow ODE takes a sample to, of the sample's shape (Song 2021,
section D.4); the same ODE takes it back. Or, with `layer`, the mean over positions of a layer's activations at one
noise level. A machine's code is the probabilities of its hidden units, decoded to the mean of the visible ones given
these; an autoencoder's, the means of its latents.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.yaml_text import parse_options
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import LoadedAutoencoder, LoadedDenoiser, LoadedMachine, LoadedModel
from scoreray.sampling.samplers.adaptive import integrate
from scoreray.sampling.samplers.noise import SAMPLING_SEED, TorchNoise
from scoreray.sampling.samplers.ode import Steps
from scoreray.sampling.samplers.options import Range, check_options
from scoreray.sampling.samplers.sample import SAMPLERS, drive
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import Condition, encoded

STREAM_LAYER = 1 << 23  # noise of samples whose activations are read, far from a sampler's draws and the loss's
MOST_STEPS = 10_000  # of rk45


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """How a denoiser encodes.

    sampler, steps: the solver of the probability-flow ODE, and its steps from the smallest to the largest noise level;
    rk45 chooses its own by rtol. layer: a module of the network by its name in `named_modules`, whose activations are
    taken at noise level `sigma` in place of the ODE's end. conditions: whether the data set's fields condition it.
    """

    sampler: Literal["euler", "heun", "dpm2", "rk45"] = "heun"
    steps: Annotated[int, Range(2, 10_000)] = 32
    rtol: Annotated[float, Range(1e-12, 0.1)] = 1e-5
    layer: str = ""
    sigma: Annotated[float, Range(1e-6, 1e6)] = 0.3
    conditions: bool = True

    @staticmethod
    def parse(text: str, flag: str) -> CodeOptions:
        """Of NAME=VALUE with commas between. Raises UserError."""
        given = parse_options([part for part in text.split(",") if part], flag, "NAME=VALUE,..., e.g. steps=64")
        given = {key: str(value) if key == "layer" else value for key, value in given.items()}
        return CodeOptions(**check_options("scoreray", CodeOptions, given, "encoder"))

    def check_fits(self, info: ModelInfo, flag: str) -> None:
        """Raises UserError where they would change nothing: other models than denoisers have one way to encode."""
        if (info.is_autoencoder or info.is_machine) and self != CodeOptions():
            given = ", ".join(name for name, value in asdict(self).items() if value != getattr(CodeOptions(), name))
            raise UserError(
                f"{flag}: {given}: options of denoisers, and the model is of network.kind "
                f"'{info.config.network.kind}': leave them out"
            )


def encode(
    model: LoadedModel,
    x0: Tensor,
    numbers: Tensor,
    condition: Condition | None = None,
    options: CodeOptions = CodeOptions(),
) -> Tensor:
    """Codes float32 [B, ...] of samples x0 [B, ...] in the model's range. numbers: int64 [B], theirs in the data set,
    which key what noise there is. Raises UserError."""
    with torch.no_grad():
        if isinstance(model, LoadedMachine):
            return model.machine.hidden_logits(model.machine.visible(x0, SAMPLING_SEED, numbers)).sigmoid().float()
        if isinstance(model, LoadedAutoencoder):
            return model.encode(x0)[0].float()
        condition = condition if options.conditions else None
        if options.layer:
            z = noise.normal(SAMPLING_SEED, numbers, tuple(x0.shape[1:]), stream=STREAM_LAYER, device=x0.device)
            return _activations(model, x0 + options.sigma * z, condition, options)
        return _flow(model, x0, condition, options, upwards=True) / model.info.sigma_range[1]


def decode(
    model: LoadedModel,
    code: Tensor,
    condition: Condition | None = None,
    options: CodeOptions = CodeOptions(),
) -> Tensor:
    """Samples float32 [B, *image_shape], in the model's range, of codes that `encode` made with equal options."""
    with torch.no_grad():
        if isinstance(model, LoadedMachine):
            visible = model.machine.picture(model.machine.visible_mean(code.to(model.machine.dtype)))
            return visible.float().view(len(code), *model.info.image_shape)
        if isinstance(model, LoadedAutoencoder):
            return model.decode(code)
        if options.layer:
            raise UserError(f"layer = {options.layer}: activations are not decoded to samples; leave it out")
        condition = condition if options.conditions else None
        return _flow(model, code * model.info.sigma_range[1], condition, options, upwards=False)


def _flow(
    model: LoadedDenoiser, x: Tensor, condition: Condition | None, options: CodeOptions, *, upwards: bool
) -> Tensor:
    """Along the probability-flow ODE from the smallest noise level to the largest, or down again. A sample counts as
    one at the smallest level: so both ways pass the same levels, and no last step to 0 denoises what comes back."""
    low, high = model.info.sigma_range
    steps: Steps
    if options.sampler == "rk45":
        begin, end = (low, high) if upwards else (high, low)
        steps = integrate(x, begin, end, model.sigma_data, options.rtol, options.rtol, MOST_STEPS)
    else:
        levels = model.info.sigmas(options.steps + 1).tolist()[:-1]
        steps = SAMPLERS[options.sampler](x, levels[::-1] if upwards else levels, TorchNoise())
    return drive(steps, model, condition=condition)[0]


def _activations(model: LoadedDenoiser, x: Tensor, condition: Condition | None, options: CodeOptions) -> Tensor:
    """[B, channels] of a layer's output [B, channels, ...] or [B, tokens, channels]. Raises UserError."""
    assert isinstance(model.network, nn.Module)
    layers = {name: module for name, module in model.network.named_modules() if name}
    if options.layer not in layers:
        have = nearest(options.layer, layers)
        raise UserError(f"layer = {shortened(options.layer)}: the network has no such module; {have}")
    found = list[Tensor]()

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        found.extend([output] if isinstance(output, Tensor) else [])

    hook = layers[options.layer].register_forward_hook(keep)
    try:
        model(x, torch.full((len(x),), options.sigma, device=x.device), encoded(model, condition))
    finally:
        hook.remove()
    if not found or found[0].ndim < 2 or len(found[0]) != len(x):
        raise UserError(f"layer = {options.layer}: gives no tensor with a row for each sample; name another module")
    output = found[0].float()
    return output.mean(1) if output.ndim == 3 else output.flatten(2).mean(2) if output.ndim > 3 else output
