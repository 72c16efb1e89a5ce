"""Whether the data have the mean and scale that a model expects, from their statistics; `sigma_data: auto`.

Networks see c_in x and learn F of unit variance (Karras 2022, table 1); sampling starts from N(0, sigma_max^2) and ends
at sigma_min. Data far from mean 0 and standard deviation sigma_data, or outside the range of noise levels, train
without an error, and the samples are garbage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.diffusion.sigma_sampling import LogNormal
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective

# Assumptions, not measured. Pictures in [-1, 1] have a standard deviation of 0.25 (dark) to 1 (black and white).
FACTOR = 2.05  # between the data's standard deviation and sigma_data, beyond which that is said
# Of a channel's mean, in sigma_data: what F, of order 1 otherwise, would have to reach at high noise.
FAR = 5.0
APART = 10.0  # between the standard deviations of channels: the smaller ones are lost beside the larger ones
TAIL = 0.02  # of the noise levels of training: the data's scale should not lie in it, at either end


@dataclass(frozen=True)
class Misfit:
    """A line about data that do not fit; `hopeless`: nothing of use can be trained."""

    text: str
    hopeless: bool


def resolve_sigma_data(config: Config, fields: RunFields, known: float | None = None) -> Config:
    """`config` with a number for `denoiser.sigma_data: auto`: the one `known` of the run, which stays whatever copy of
    the data it goes on with, or the standard deviation of the data's values."""
    if config.denoiser.sigma_data != "auto":
        return config
    sigma_data = known or fields.sigma_data
    denoiser = type(config.denoiser)(config.denoiser.parameterization, sigma_data)
    return config.model_copy(update={"denoiser": denoiser})


def misfit(config: Config, fields: RunFields) -> Misfit | None:
    """A warning of one line, where a model with this config would not learn these data well; None where it should."""
    objective = config.objective
    if config.network.is_machine or isinstance(objective, AutoencodingObjective):  # no noise level to scale
        return None
    config = resolve_sigma_data(config, fields)
    expected, std, mean = config.denoiser.resolved_sigma_data, fields.sigma_data, fields.mean
    stds = [value for value in fields.std if value > 0] or [std]
    low, high = config.process.sigma_range()
    offset = max(abs(value) for value in mean)
    hopeless = std >= high or std <= low or offset >= high
    within = math.hypot(*stds) / math.sqrt(len(stds))  # what is left when each channel is centered
    uneven = not fields.is_image and (offset > FAR * within or max(stds) > APART * min(stds))
    scaled = not 1 / FACTOR <= std / expected <= FACTOR
    ends = torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)
    first, last = objective.sigma_sampling.quantile(ends, config.process).tolist()
    unseen = not first <= std <= last
    if not (hopeless or uneven or scaled or unseen):
        return None
    found = (
        f"data.url: the data have channel means {_range(mean)}, standard deviations {_range(stds)}, {std:.3g} of all "
        f"values; the model expects mean 0 and denoiser.sigma_data {expected:.3g}"
    )
    if hopeless:
        found += f", and the process has noise levels from {low:.3g} to {high:.3g} only"
    elif unseen:
        found += f", and {100 - 200 * TAIL:.0f}% of its training at noise levels from {first:.3g} to {last:.3g}"
    return Misfit(f"{found}; {_fix(config, objective.sigma_sampling, fields)}", hopeless)


def _fix(config: Config, sampling: object, fields: RunFields) -> str:
    normaliser = fields.target.normaliser
    if normaliser is not None and normaliser.kind in ("none", "range") and fields.std:  # statistics are needed
        constant = next((number for number, std in enumerate(fields.std) if std <= 0), None)
        out = "" if constant is None else f"pack them without channel {constant}, the same in every sample, and "
        return f"{out}set data.normalisation=channel"
    factor = fields.sigma_data / 0.5
    settings = ["denoiser.sigma_data=auto"]
    if isinstance(config.process, EDM) and isinstance(sampling, LogNormal):  # EDM's own settings, in the data's units
        shifted = LogNormal().P_mean + math.log(factor)
        settings += [
            f"process.sigma_min={EDM().sigma_min * factor:.3g}",
            f"process.sigma_max={EDM().sigma_max * factor:.3g}",
            f"objective.sigma_sampling.P_mean={shifted:.3g}",
        ]
    return f"set {' '.join(settings)}"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
