"""Traces of a Jacobian, a sample at a time, exactly or by random directions; a function's derivative along a path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.layers import outside_graphs


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


@outside_graphs
@torch.no_grad()
def path_derivative(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, slope: Tensor) -> Tensor:
    """d function(x, sigma) / dsigma along dx/dsigma = slope, [B, ...] like x [B, ...]; sigma [B].

    One pass of forward-mode dual numbers, without transforms of the function, so that a module's hooks run. Random
    numbers that it draws (dropout) are drawn again by the next call. Attention takes products, as fused kernels have no
    forward derivative. Raises UserError where another operation has none.
    """
    devices = [x.get_device()] if x.is_cuda else []
    with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        x, sigma = x.contiguous(), sigma.contiguous()  # expanded ones hold no tangents
        duals = forward_ad.make_dual(x, slope), forward_ad.make_dual(sigma, torch.ones_like(sigma))
        try:
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
        except NotImplementedError as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"network: an operation has no forward derivative ({why}); objective.kind consistency needs none"
            ) from error
    return torch.zeros_like(x) if tangent is None else tangent
