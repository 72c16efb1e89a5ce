"""Data sets as sources of webdataset pipelines, and the decoder of their samples."""

from scoreray.data.reading.allowlist import SampleDecoder

__all__ = ["SampleDecoder"]
