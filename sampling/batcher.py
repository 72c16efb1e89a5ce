"""A short path, kept for callers: the step batcher of `sampling/service/`, and the request that it takes."""

from scoreray.sampling.service.batcher import StepBatcher, Ticket
from scoreray.sampling.service.request import SampleRequest

__all__ = ["SampleRequest", "StepBatcher", "Ticket"]
