"""The tables of docs/scaling.md, by the model of `trainer/engine/communication.py`; a test compares them.

Printed by `python docs/tools/scaling.py`.
"""

from __future__ import annotations

from dataclasses import replace

from scoreray.trainer.engine.communication import GpuNodes, Sharding, Work, step_time

NODES = GpuNodes()
WAYS = {"zero0": Sharding(0), "zero1": Sharding(1), "zero2": Sharding(2), "zero3": Sharding(3), "hpz": Sharding(3, 8)}
SIZES = (8, 16, 64, 256, 1024)

# DiT-XL/2 at 256 x 256 (Peebles and Xie 2023: 118.6 GMAC forward), and one of the same shape that is wider and deeper.
WORKS = {
    "DiT-XL, 675 M parameters, 32 images a GPU": Work(675e6, 0.712e12, 32),
    "DiT-XL, 675 M parameters, 64 images a GPU": Work(675e6, 0.712e12, 64),
    "DiT of 5 B parameters (assumption: 5.3 TFLOP an image), 32 images a GPU": Work(5e9, 5.3e12, 32, num_layers=48),
}


def efficiency(way: str, num_gpus: int, work: Work, nodes: GpuNodes = NODES) -> float:
    return step_time(WAYS[way], num_gpus, work, nodes).efficiency


def table(work: Work, nodes: GpuNodes = NODES) -> str:
    """Markdown: a row for each way, a column for each number of GPUs."""
    lines = ["| | " + " | ".join(f"{n:,}" for n in SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for way in WAYS:
        cells = " | ".join(f"{efficiency(way, n, work, nodes):.1%}" for n in SIZES)
        lines.append(f"| `{way}` | {cells} |")
    return "\n".join(lines)


def table_of_zero0() -> str:
    """Markdown: zero_stage 0 where the two parts of a sum are not pipelined; a row for each network."""
    lines = ["| `zero0` | " + " | ".join(f"{n:,}" for n in SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for name, work in WORKS.items():
        cells = " | ".join(f"{efficiency('zero0', n, work, replace(NODES, pipelined=False)):.1%}" for n in SIZES)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name, work in WORKS.items():
        print(f"{name}\n\n{table(work)}\n")
    print(table_of_zero0())
