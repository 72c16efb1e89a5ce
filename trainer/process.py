"""A short path, kept for callers: all that is public of `trainer/diffusion/process.py`."""

from scoreray.trainer.diffusion.process import DDPM, EDM, VE, VP, Cosine, FlowMatching, GaussianProcess, SubVP

__all__ = ["Cosine", "DDPM", "EDM", "FlowMatching", "GaussianProcess", "SubVP", "VE", "VP"]
