"""Data sets as sources of webdataset pipelines, and the decoder of their samples."""

from scoreray.data.reading.allowlist import SampleDecoder
from scoreray.data.webdataset.source import shards

__all__ = ["SampleDecoder", "shards"]
