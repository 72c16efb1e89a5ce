"""A short path, kept for callers: all that is public of `sampling/model/load.py`."""

from scoreray.sampling.model.load import (
    LoadedAutoencoder,
    LoadedDenoiser,
    LoadedMachine,
    load,
    load_machine,
    load_model,
)

__all__ = ["LoadedAutoencoder", "LoadedDenoiser", "LoadedMachine", "load", "load_machine", "load_model"]
