"""A short path, kept for callers: all that is public of `sampling/samplers/sigmas.py`."""

from scoreray.sampling.samplers.sigmas import as_grid, from_process, geometric, grid, interior, karras, linear

__all__ = ["as_grid", "from_process", "geometric", "grid", "interior", "karras", "linear"]
