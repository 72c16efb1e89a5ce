"""Noise grids, samplers, loading of checkpoints and the generation of samples."""
