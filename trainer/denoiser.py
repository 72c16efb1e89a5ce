"""A short path, kept for callers: all that is public of `trainer/diffusion/denoiser.py`."""

from scoreray.trainer.diffusion.denoiser import Denoiser, DenoiserConfig, check_inputs, convert, like, tweedie

__all__ = ["Denoiser", "DenoiserConfig", "check_inputs", "convert", "like", "tweedie"]
