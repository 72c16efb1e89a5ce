"""Samplers as generators, noise grids, and the normal numbers that they use."""

from scoreray.sampling.samplers.sample import ADAPTIVE, SAMPLERS, drive, num_calls, sample, sampler_of, start

__all__ = ["ADAPTIVE", "SAMPLERS", "drive", "num_calls", "sample", "sampler_of", "start"]
