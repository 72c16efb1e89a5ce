"""The trace of a function's Jacobian, a sample at a time: exactly, or in expectation over random directions."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_trace(outputs: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """tr d outputs / dx of each sample, [B]: one backward pass per dimension. x [B, ...] requires a gradient.

    The rows are summed over the batch before they are differentiated, as no sample's output depends on another's x.
    """
    flat = outputs.flatten(1)
    trace = torch.zeros_like(flat[:, 0])
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True, create_graph=create_graph)
        trace = trace + row.flatten(1)[:, i]
    return trace


def projected_trace(outputs: Tensor, x: Tensor, directions: Tensor, *, create_graph: bool = False) -> Tensor:
    """The mean of v . (d outputs / dx)^T v over directions [B, P, d], [B]: the trace on average (Hutchinson 1989)."""
    flat, total = outputs.flatten(1), torch.zeros_like(directions[:, 0, 0])
    for v in directions.unbind(1):
        (product,) = torch.autograd.grad(flat, x, v, retain_graph=True, create_graph=create_graph)
        total = total + (product.flatten(1) * v).sum(1)
    return total / directions.shape[1]
