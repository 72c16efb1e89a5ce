"""Attention as networks compute it, with a mask of keys or without, against torch's scaled-dot-product attention.

    python benchmarks/attention.py [--no-mask] [--device cuda] [--dtype bfloat16 float32] [--seconds 2]

q [B, 4, T, 64], k and v [B, 4, S, 64], rows of random lengths; forward without gradients, and forward and backward. The
ways take turns and the best time of each counts, on a CPU of this thread's own CPU time with one thread. `unmasked` is
torch's kernel without the mask: what a mask costs. Ratios above 1: the way that networks take is the faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scoreray.trainer.diffusion.layers import attend, attention_by_products

CASES = [(64, 32), (64, 80), (256, 80), (1024, 80), (256, 256), (512, 512), (1024, 1024)]  # (queries, keys)
SELF = [(256, 256), (512, 512), (768, 768), (1024, 1024), (2048, 2048)]  # without a mask: tokens among themselves
Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])


def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


WAYS: dict[str, Way] = {"ours": attend, "products": attention_by_products, "fused": fused, "unmasked": unmasked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-mask", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default 4 on a CPU, 256 on a GPU")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=2, help="of each case")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("medium")  # as training steps have it
    batch = arguments.batch or (4 if arguments.device == "cpu" else 256)
    print(
        f"{'type':9}{'queries':>8}{'keys':>6} {'pass':9}"
        + "".join(f"{way + ' ms':>13}" for way in WAYS)
        + "  fused/ours"
    )
    for dtype in arguments.dtype:
        for queries, keys in SELF if arguments.no_mask else CASES:
            for backward in (False, True):
                times = measured(batch, queries, keys, getattr(torch, dtype), backward, arguments)
                row = "".join(f"{1e3 * seconds:13.3f}" for seconds in times.values())
                passes = "both" if backward else "forward"
                ratio = times["fused"] / times["ours"]
                print(f"{dtype:9}{queries:8}{keys:6} {passes:9}{row}{ratio:12.2f}", flush=True)


def measured(
    batch: int, queries: int, keys: int, dtype: torch.dtype, backward: bool, arguments: argparse.Namespace
) -> dict[str, float]:
    """Best seconds of each way."""
    q, g = torch.randn(2, batch, 4, queries, 64, device=arguments.device, dtype=dtype)
    k, v = torch.randn(2, batch, 4, keys, 64, device=arguments.device, dtype=dtype)
    mask = torch.arange(keys, device=arguments.device) < torch.randint(1, keys, (batch, 1), device=arguments.device)
    given = None if arguments.no_mask else mask
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    clock = time.thread_time if arguments.device == "cpu" else time.perf_counter
    best, end, turns = dict.fromkeys(WAYS, float("inf")), time.time() + arguments.seconds, 0
    while turns < 4 or time.time() < end:
        for name, way in WAYS.items():
            start = clock()
            with torch.set_grad_enabled(backward):
                out = way(q, k, v, given)
                if backward:
                    torch.autograd.grad(out, inputs, g)
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            best[name] = min(best[name], clock() - start)
        turns += 1
    return best


if __name__ == "__main__":
    main()
