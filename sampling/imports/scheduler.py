"""From a scheduler's config of diffusers to our process, what the network predicts, and its timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.extras import check_installed
from scoreray.trainer.diffusion.denoiser import Parameterization
from scoreray.trainer.diffusion.process import DDPM, EDM, VE, BetaSchedule, FlowMatching
from scoreray.trainer.networks.pretrained_folder import quiet

DISCRETE = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Solvers of one kind of model: betas over num_train_timesteps."""
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
KARRAS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
EXPLODING = ("ScoreSdeVeScheduler",)
KNOWN = (*DISCRETE, *FLOW, *KARRAS, *EXPLODING)
BETAS: dict[str, BetaSchedule] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "squared_cosine",
}
PREDICTIONS: dict[str, Parameterization] = {
    "epsilon": "noise",
    "sample": "denoised",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
LEAST_ALPHA_BAR = 2.0**-24  # in the place of 0 (zero terminal SNR), as diffusers' own Euler and DPM-Solver put it
MAX_STEPS = 100_000  # that a model was trained on; usual: 1000
FLOW_T_MAX = 0.9999  # the signal is gone at 1, where sigma / alpha is infinite


@dataclass(frozen=True)
class TrainedNoise:
    """process: that samples are drawn by.  schedule: by whose times the network knows noise levels.
    left_out: settings of the scheduler's own sampling that change what it draws, and that our samplers do not have."""

    process: DDPM | FlowMatching | EDM | VE
    schedule: DDPM | FlowMatching | EDM | VE
    parameterization: Parameterization
    sigma_data: float = 1.0
    num_steps: int = 1000
    left_out: tuple[str, ...] = ()


def trained_noise(config: dict[str, Any], num_tokens: int = 0) -> TrainedNoise:
    """config: a scheduler_config.json.  num_tokens: of a sample, from which a dynamic flow shift follows.

    Raises UserError where the scheduler, its betas or its prediction type are not known, DataError where diffusers
    refuses the config.
    """
    name = str(config.get("_class_name"))
    if name not in KNOWN:
        raise UserError(f"scheduler '{shortened(name)}': {nearest(name, KNOWN)}; another scheduler_config.json of the "
                        "same model goes with --scheduler")  # fmt: skip
    check_installed("diffusers", "import diffusers", "diffusers")
    import diffusers

    _check_betas(config)
    try:
        with quiet("diffusers"):
            scheduler = getattr(diffusers, name).from_config(config)  # which knows the defaults of what is left out
    except (ImportError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise DataError(f"scheduler: {name} of diffusers refuses it: {reason}") from None
    known = scheduler.config
    prediction = known.get("prediction_type", "flow_prediction" if name in FLOW else "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"scheduler: prediction_type '{prediction}': {nearest(str(prediction), PREDICTIONS)}")
    left_out = tuple(key for key in ("clip_sample", "thresholding") if known.get(key))
    if name in KARRAS:
        if prediction != "epsilon":
            raise UserError(f"scheduler: {name} with prediction_type '{prediction}'; epsilon is supported")
        edm = EDM(known["sigma_min"], known["sigma_max"])
        return TrainedNoise(edm, edm, "edm", known["sigma_data"], left_out=left_out)
    if name in EXPLODING:  # of pictures from 0 to 1, which from -1 to 1 have twice the noise
        exploding = VE(2 * known["sigma_min"], 2 * known["sigma_max"])
        return TrainedNoise(exploding, exploding, "score")
    num_steps = int(known["num_train_timesteps"])
    if name in FLOW or prediction == "flow_prediction":
        shift = _dynamic_shift(known, num_tokens) or known.get("shift", known.get("flow_shift", 1.0))
        process = FlowMatching(t_max=FLOW_T_MAX, shift=float(shift))
        return TrainedNoise(process, FlowMatching(), "velocity", num_steps=num_steps, left_out=left_out)
    ddpm = _ladder(scheduler, num_steps)
    return TrainedNoise(ddpm, ddpm, PREDICTIONS[prediction], num_steps=num_steps, left_out=left_out)


def _check_betas(config: Mapping[str, Any]) -> None:
    """Before diffusers makes arrays of them. Raises DataError."""
    steps, betas = config.get("num_train_timesteps", MAX_STEPS), config.get("trained_betas")
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise DataError(f"scheduler: num_train_timesteps {shortened(repr(steps))}; accepted: 1 to {MAX_STEPS:,}")
    if betas is None:
        return
    numbers = isinstance(betas, list) and all(isinstance(beta, int | float) and 0 <= beta <= 1 for beta in betas)
    if not numbers or len(betas) != config.get("num_train_timesteps", len(betas)):
        raise DataError(
            f"scheduler: trained_betas must be num_train_timesteps numbers from 0 to 1: {shortened(repr(betas))}"
        )


def _ladder(scheduler: Any, num_steps: int) -> DDPM:
    """By its name where its betas have one of ours; else the betas themselves."""
    known = scheduler.config
    schedule = BETAS.get(known.beta_schedule)
    zero_snr = known.get("rescale_betas_zero_snr")
    if known.get("trained_betas") is None and not zero_snr and schedule is not None:
        if schedule == "squared_cosine":
            return DDPM(num_steps=num_steps, schedule=schedule)
        return DDPM(known.beta_start, known.beta_end, num_steps, schedule)
    alpha_bar = [1.0, *scheduler.alphas_cumprod.double().clamp(min=LEAST_ALPHA_BAR).tolist()]
    betas = tuple(1 - alpha_bar[i + 1] / alpha_bar[i] for i in range(num_steps))
    return DDPM(num_steps=num_steps, betas=betas)


def _dynamic_shift(known: Any, num_tokens: int) -> float | None:
    """The shift at a size, where it is one of the size: diffusers' `calculate_shift`, a line through two sizes."""
    if not known.get("use_dynamic_shifting") or not num_tokens:
        return None
    slope = (known["max_shift"] - known["base_shift"]) / (known["max_image_seq_len"] - known["base_image_seq_len"])
    mu = known["base_shift"] + slope * (num_tokens - known["base_image_seq_len"])
    return math.exp(mu) if known["time_shift_type"] == "exponential" else mu
