"""The training step alone on one GPU, without Ray: images/s and MFU against the measured matmul rate.

    python benchmarks/gpu.py [--case dit unet dit-text] [--batch 64 256] [--no-compile] [--steps 30]
    python benchmarks/gpu.py --quick [--out DIR] [--minutes 3]      all that is asked of a new card
    python benchmarks/gpu.py --device cpu --tiny          the same path on a CPU, in seconds (--quick too)

A DiT of 130 M parameters on 32 x 32 x 4 latents and a U-Net of 131 M on 64 x 64 x 3, both with classes, and the DiT
with 1 to 77 tokens of 768 numbers that every block attends to. bf16 weights with fp32 masters, AdamW with two averages
in the step (the engine at zero_stage 0), torch.compile on. FLOPs are the network's forward and backward pass, counted
on the meta device; the rate is the best of square bf16 matrix products on the same device.

--quick runs the tests that need CUDA and, beside them, compiles the DiT and the U-Net, each in a process of its own:
Inductor keeps the kernels on disk. Then each is measured alone, from these. What fails or runs out of time is said, and
the case measured without compiling. Prints as it goes, and writes gpu.json, rewritten after each measurement, and each
part's output to DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from scoreray.trainer.config import Config, load_config
from scoreray.trainer.diffusion.condition import LABEL, Condition, ConditionSpec, class_condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.engine import build_engine, resolve_precision
from scoreray.trainer.networks.flops import matmul_rate, training_flops
from scoreray.trainer.networks.network import num_parameters
from scoreray.trainer.step import TrainingModule

TOKENS = {"t5": ConditionSpec("sequence", (77, 768))}
CLASSES = class_condition([str(number) for number in range(1000)])
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "dit": ({"kind": "dit", "patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 12}, (4, 32, 32)),
    "unet": ({"kind": "unet", "model_channels": 192, "channel_mult": [1, 2, 3], "num_blocks": 3}, (3, 64, 64)),
}
CASES["dit-text"] = CASES["dit"]
TINY: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "dit": ({"kind": "dit", "patch_size": 4, "hidden_size": 64, "depth": 2, "num_heads": 2}, (4, 16, 16)),
    "unet": ({"kind": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}, (3, 16, 16)),
}
TINY["dit-text"] = TINY["dit"]
WARM_UP = 5
ROOT = Path(__file__).resolve().parents[1]
CUDA_TESTS = ["tests/trainer/test_gpu.py", "tests/sampling/test_gpu.py"]
QUICK = {"dit": 256, "unet": 64}  # the batch of each
PREPARING, MEASURING = 0.56, 0.22  # of the time of --quick: tests and compiling, each case's measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the path anywhere")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the CUDA tests, the DiT and the U-Net")
    parser.add_argument("--minutes", type=float, default=3.0, help="that --quick takes at most")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="of --quick")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; --device cpu --tiny tries the same path")
    if arguments.quick:
        quick(arguments)
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.case:
        for batch in [8] if arguments.tiny else arguments.batch:
            rows.append(measure(name, batch, device, arguments))
            if not arguments.json:
                show(rows[-1], first=len(rows) == 1)
    if arguments.json:
        print(json.dumps(rows))


def quick(arguments: argparse.Namespace) -> None:
    """Tests and compiling at once, then a measurement of each case alone."""
    began, whole_s = time.perf_counter(), 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    passed_on = ["--device", arguments.device, *["--tiny"] * arguments.tiny, *["--no-compile"] * arguments.no_compile]
    parts: list[Part] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the parts end with it

    def begin(name: str, command: list[str]) -> Part:
        parts.append(Part([sys.executable, *command], arguments.out / f"gpu-{name}.log"))
        return parts[-1]

    def case(name: str, kind: str, steps: int, *more: str) -> Part:
        asked = ["--case", name, "--batch", str(QUICK[name]), "--steps", str(steps), "--json", *passed_on, *more]
        return begin(f"{name}-{kind}", [__file__, *asked])

    try:
        tests = begin("tests", ["-m", "pytest", "-q", "-rs", *[str(ROOT / test) for test in CUDA_TESTS]])
        prepared = {name: case(name, "first-steps", 1) for name in QUICK}
        until = began + PREPARING * whole_s
        failures = {name: why for name, part in prepared.items() if (why := part.failure(until))}
        record: dict[str, Any] = {
            "tests": tests.failure(until) or tests.last_line(),
            "first_steps": failures,
            "rows": [],
        }
        for what, found in {"CUDA tests": record["tests"], **failures}.items():
            print(f"{what}: {found}", flush=True)
        for name in QUICK:
            part = case(name, "measured", arguments.steps, *["--no-compile"] * (name in failures))
            if why := part.failure(time.perf_counter() + MEASURING * whole_s):
                print(f"{name}: {why}", flush=True)
                record["rows"].append({"case": name, "failure": why})
            else:
                record["rows"].extend(json.loads(part.last_line()))
                show(record["rows"][-1], first=name == next(iter(QUICK)))
            record["seconds"] = time.perf_counter() - began
            (arguments.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    finally:
        for part in parts:
            part.stop()
    print(f"{time.perf_counter() - began:.0f} s in all.")


class Part:
    """A command in a process of its own, its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def failure(self, deadline: float) -> str | None:
        """Why it did not end well by `deadline`, of time.perf_counter(), at which it is stopped; None if it did."""
        try:
            status = self._process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            self.stop()
            return f"stopped, as its time was over: {self.last_line()} ({self._log})"
        return None if status == 0 else f"status {status}: {self.last_line()} ({self._log})"

    def last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def stop(self) -> None:
        """With all processes that it began, as the compiler does."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def show(row: dict[str, Any], *, first: bool) -> None:
    """A line for each case as soon as it is measured: compiling takes minutes, and a later one may fail."""
    if first:
        print(f"{row['device']}, {row['precision']}, matmul {row['matmul_tflops']:.1f} TFLOP/s")
        print(
            f"{'case':9}{'params':>10}{'batch':>7}{'compiled':>9}"
            f"{'images/s':>10}{'ms/step':>9}{'MFU':>7}{'peak GiB':>10}"
        )
    size, peak = f"{row['params'] / 1e6:.1f} M", row["peak_bytes"] / 2**30
    head = f"{row['case']:9}{size:>10}{row['batch']:7}{row['compiled']!s:>9}{row['images_per_s']:10.1f}"
    print(f"{head}{row['ms']:9.1f}{row['mfu']:7.1%}{peak:10.1f}", flush=True)


def measure(name: str, batch: int, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.compiler.reset()  # else the second batch size would be compiled for any size
    network_config, shape = (TINY if arguments.tiny else CASES)[name]
    config = run_config(network_config, batch, compiled=not arguments.no_compile)
    torch.manual_seed(0)
    network = config.network.build(shape, TOKENS if name == "dit-text" else CLASSES)
    num_params, work = num_parameters(network), training_flops(network, shape)
    denoiser = Denoiser(network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data)
    module = TrainingModule(denoiser, config.objective, config.process, seed=0, global_batch_size=batch)
    parts = config.engine, config.optimizer, config.ema
    engine = build_engine(module, *parts, global_batch_size=batch, world_size=1, device=device)
    images = torch.randn(batch, *shape, device=device)
    condition = condition_of(name, batch).to(device)
    seconds = []
    for step in range(WARM_UP + arguments.steps):
        start = time.perf_counter()
        loss, _ = engine.module(images, condition, torch.arange(batch, device=device) + step * batch)
        engine.backward(loss.mean())
        engine.step(1e-4, config.ema.decays(step + 1, batch))  # reads the norm, so the step has ended here
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    precision = resolve_precision(config.engine.precision, device)
    rate = matmul_rate(device, precision)
    median = statistics.median(seconds)
    return {
        "case": name,
        "params": num_params,
        "batch": batch,
        "images_per_s": batch / median,
        "ms": 1e3 * median,
        "mfu": work * batch / median / rate,
        "flops_per_image": work,
        "matmul_tflops": rate / 1e12,
        "precision": str(precision).removeprefix("torch."),
        "compiled": config.engine.compile,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def condition_of(case: str, batch: int) -> Condition:
    """Classes, or tokens of 1 to 77."""
    if case != "dit-text":
        return Condition({LABEL: torch.randint(0, 1000, (batch,))})
    length, width = TOKENS["t5"].shape
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    return Condition({"t5": torch.randn(batch, length, width)}, {"t5": mask})


def run_config(network: dict[str, Any], batch: int, *, compiled: bool) -> Config:
    return load_config(
        {
            "run": {"name": "gpu", "storage": "nowhere"},
            "data": {"url": "nowhere", "global_batch_size": batch},
            "network": network,
            "engine": {"zero_stage": 0, "precision": "bf16", "compile": compiled},
            "duration": {"images": batch},
        }
    )


if __name__ == "__main__":
    main()
