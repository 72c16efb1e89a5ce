"""A short path, kept for callers: all that is public of `sampling/service/batcher.py`."""

from scoreray.sampling.service.batcher import (
    SampleRequest,
    StepBatcher,
    Ticket,
)

__all__ = ["SampleRequest", "StepBatcher", "Ticket"]
