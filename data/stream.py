"""A short path, kept for callers: all that is public of `data/reading/stream.py`."""

from scoreray.data.reading.stream import Batch, Stream, default_shuffle_block

__all__ = ["Batch", "Stream", "default_shuffle_block"]
