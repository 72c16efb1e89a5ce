"""Noise grids optimised for one model, sampler and number of steps: how they are found, and how they are stored."""
