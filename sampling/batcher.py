"""A short path, kept for callers: the step batcher of `sampling/service/`, and the request that it takes."""

from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.request import SampleRequest
from scoreray.sampling.service.ticket import Ticket

__all__ = ["SampleRequest", "StepBatcher", "Ticket"]
