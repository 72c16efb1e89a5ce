"""One of two ranks that sum gradients behind the backward pass, a process of test_overlap.py: `RANK 2 FOLDER PORT`."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from scoreray.trainer.config import load_config
from scoreray.trainer.engine import overlap
from scoreray.trainer.engine.flat import FlatEngine

RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
ROWS = 6


class Network(torch.nn.Module):
    """Five layers, one frozen; `spare` takes part where a case names it; `second`: the loss has a second derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spare = torch.nn.Linear(8, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(5))
        self.layers[2].requires_grad_(False)

    def forward(self, x: torch.Tensor, spare: bool, second: bool) -> torch.Tensor:
        x = x.detach().requires_grad_(second)
        h = self.spare(x) if spare else x
        for layer in self.layers:
            h = torch.tanh(layer(h))
        if second:
            (h,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        return h.square().sum(dim=1)


def engine_of(network: Network, precision: str, num_micro_batches: int) -> FlatEngine:
    config = load_config(
        {
            "run": {"name": "x", "storage": str(FOLDER)},
            "data": {"url": "nowhere", "global_batch_size": WORLD * ROWS},
            "duration": {"images": WORLD * ROWS},
            "optimizer": {"gradient_clip": 0},
            "engine": {"precision": precision, "micro_batch_size": ROWS // num_micro_batches},
        }
    )
    return FlatEngine(
        network,
        config.engine,
        config.optimizer,
        config.ema,
        rank_batch_size=ROWS,
        world_size=WORLD,
        device=torch.device("cpu"),
    )


def loss(network: Network, case: dict, generator: torch.Generator) -> torch.Tensor:
    """Of the next micro-batch."""
    x = torch.randn(ROWS // case.get("micro", 1), 8, generator=generator).to(network.spare.weight.dtype)
    spare = case.get("spare", "all") in ("all", f"rank {RANK}")
    return network(x, spare, case.get("second", False)).mean()


def reference(case: dict) -> torch.Tensor:
    """The first step's gradient by autograd alone and one sum."""
    network = Network().to(torch.bfloat16 if case.get("half") else torch.float32)
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters))
    generator = torch.Generator().manual_seed(RANK)
    micro = case.get("micro", 1)
    for _ in range(micro):
        grads = torch.autograd.grad(
            loss(network, case, generator).float() / micro, parameters, allow_unused=True, materialize_grads=True
        )
        total += torch.cat([g.float().flatten() for g in grads])
    dist.all_reduce(total)
    return total / WORLD


def run(case: dict, elements: int) -> dict:
    """The summed gradient, the weights after three steps, and what was summed when."""
    network = Network().to(torch.bfloat16 if case.get("half") else torch.float32)
    with mock.patch.object(overlap, "bucket_elements", return_value=elements):
        engine = engine_of(network, "bf16" if case.get("half") else "fp32", case.get("micro", 1))
    events: list = []
    begin = dist.all_reduce
    generator = torch.Generator().manual_seed(RANK)

    def all_reduce(tensor, *args, **kwargs):
        events.append(tensor.storage_offset())
        return begin(tensor, *args, **kwargs)

    network.layers[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    with mock.patch.object(dist, "all_reduce", all_reduce):
        for step in range(3):
            for _ in range(engine.num_micro_batches):
                engine.backward(loss(network, case, generator).float())
                events.append("backward ended")
            if step == 0:
                engine._sum.finish()
                gradient = engine._master.grad.clone() / WORLD
                first, engine._sum.finish = engine._sum.finish, lambda: None
            norm = engine.step(0.01, [0.9] * len(engine.optimizer.ema_keys))
            if step == 0:
                engine._sum.finish, first_events = first, list(events)
    return {"gradient": gradient, "weights": engine._master.detach(), "norm": norm, "events": first_events}


CASES = {
    "plain": {},
    "micro": {"micro": 3},
    "half": {"half": True, "micro": 2},
    "second": {"second": True},
    "no rank": {"spare": "no rank"},
    "one rank": {"spare": "rank 0", "micro": 2},
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{sys.argv[4]}",
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(minutes=4),  # of a busy machine
    )
    facts = {}
    for name, case in CASES.items():
        one, two, right = run(case, 50), run(case, 50), reference(case)
        same = torch.equal(one["gradient"], two["gradient"]) and torch.equal(one["weights"], two["weights"])
        everyones = [torch.empty_like(one["weights"]) for _ in range(WORLD)]
        dist.all_gather(everyones, one["weights"])
        facts[name] = {
            "same bits again": same and torch.equal(*everyones),
            "gradient": one["gradient"].tolist(),
            "reference": right.tolist(),
            "events": one["events"],
        }
    (FOLDER / f"facts-{RANK}.json").write_text(json.dumps(facts))
    dist.barrier()


main()
os._exit(0)  # not through the interpreter's end: gloo's and DeepSpeed's threads abort it now and then
