"""Distributed training of score-based generative models on Ray, and sampling from them."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("scoreray")
except PackageNotFoundError:  # the modules without the installation's metadata, as from a zip
    __version__ = "unknown"

__all__ = ["__version__"]
