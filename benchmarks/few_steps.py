"""What few steps give: a teacher, its students, grids optimised for it, in network calls, FID and samples a second.

    PYTHONPATH=docs/tools python benchmarks/few_steps.py OUT [--students consistency ...] [--seed 0] [--count 5000]
                                                         [--source FILE.npz] [key=value ...]

The teacher is configs/demo.yaml, a student each file of configs/few-step, trained from the teacher's checkpoint; both
in this process on one core, so that other students may be trained beside it by the same command with other --students.
`key=value` changes the configs of all, for data that want another network (`--source`: what is packed instead of the
demo's images). What an earlier call has done in OUT is found again: a run goes on from its last checkpoint, a finished
evaluation is read.

FID is that of `scoreray evaluate` against all images that were trained on; its error is the jackknife's. Samples a
second: 256 in batches of 64 on one core, the best of three. Prints a table, and writes few_steps.json and few_steps.png
(the same seeds drawn by each row) to OUT.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from few_steps_sheet import sheet
from gallery import save_small

from scoreray.cluster.verbs.grid import optimise_to
from scoreray.cluster.verbs.pack import pack_with_bar
from scoreray.data import fashion_mnist_path
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.samplers.sample import num_calls
from scoreray.sampling.samplers.sigmas import Grid, grid_text
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run

CONFIGS = Path(__file__).parents[1] / "configs"
STUDENTS = sorted(path.stem for path in (CONFIGS / "few-step").glob("*.yaml"))
TIMED, SHOWN, BATCH = 256, 12, 64
BUDGET = 60  # grids that an optimised one may try


@dataclass(frozen=True)
class Row:
    """A model and how it is drawn; None: what fits it."""

    model: str
    sampler: str | None = None
    steps: int | None = None
    grid: Grid | None = None

    @property
    def title(self) -> str:
        steps = f"{self.steps} steps" if self.steps else None
        return ", ".join(part for part in (self.model, self.sampler, steps, grid_text(self.grid or "")) if part)


@dataclass(frozen=True)
class Measured:
    """A row's number of network calls, FID with its standard error, and samples a second on one core."""

    row: Row
    calls: int
    fid: float
    error: float
    images_seen: int
    samples_per_s: float


TEACHER_ROWS = [
    Row("teacher", "heun", 18, "karras"),
    Row("teacher", "dpmpp_2m", 18, "karras"),
    Row("teacher", "dpmpp_2m", 6, "karras"),
    Row("teacher", "dpmpp_2m", 6, "optimised"),
]
STUDENT_GRIDS: tuple[Grid, ...] = ((80.0,), (80.0, 1.5), (80.0, 2.5, 0.8, 0.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--students", nargs="*", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--seed", type=int, default=0, help="of training and of the samples")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--source", default=str(fashion_mnist_path()))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    chosen = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    data = str(chosen.out / "data")
    pack_with_bar(chosen.source, data, name="few-steps", samples_per_shard=1000, workers=1)
    shared = [
        *chosen.overrides,
        f"data.url={data}",
        f"run.storage={chosen.out / 'runs'}",
        f"run.seed={chosen.seed}",
        "engine.zero_stage=0",
        "scaling.workers=1",
    ]
    runs = {"teacher": trained(load_config(CONFIGS / "demo.yaml", [*shared, f"run.name=teacher-{chosen.seed}"]))}
    for row in TEACHER_ROWS:
        if row.grid == "optimised" and not Path(runs["teacher"], "grids", f"{row.sampler}-{row.steps}.json").exists():
            optimise_to(runs["teacher"], None, Request(TIMED, row.sampler, row.steps, seed=chosen.seed), BUDGET)
    found = [measured(row, runs, data, chosen) for row in TEACHER_ROWS]
    for name in chosen.students:
        of_teacher = [f"init.checkpoint={runs['teacher']}", f"run.name={name}-{chosen.seed}"]
        config = load_config(CONFIGS / "few-step" / f"{name}.yaml", [*shared, *of_teacher])
        runs[name] = trained(config)
        found += [measured(Row(name, grid=grid), runs, data, chosen) for grid in STUDENT_GRIDS]
    print("\n".join(table(found)))
    (chosen.out / "few_steps.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    pictures = [(one.row.title, drawn(one.row, runs[one.row.model], SHOWN, chosen.seed)) for one in found]
    save_small(sheet(pictures), chosen.out / "few_steps.png")


def trained(config: Config) -> str:
    """The run of a config, trained to its end; its URL."""
    began = time.perf_counter()
    config = prepare_run(config).config
    images = train(config)
    url = f"{config.run.storage}/{config.run.name}"
    print(f"{url}: {images:,} images, {time.perf_counter() - began:.0f} s", flush=True)
    return url


def measured(row: Row, runs: dict[str, str], data: str, chosen: argparse.Namespace) -> Measured:
    url = runs[row.model]
    settings = EvaluationSettings(
        url,
        data,
        metrics=("fid",),
        cache=str(chosen.out / "cache"),
        sampler=row.sampler,
        steps=row.steps,
        grid=row.grid,
        seed=chosen.seed,
        count=chosen.count,
        batch_size=BATCH,
    )
    record = evaluate(settings).record
    fid, subject = record.metrics["fid"], record.subject
    assert fid.value is not None
    assert fid.std_error is not None
    seconds = []
    for _ in range(3):
        began = time.process_time()
        drawn(row, url, TIMED, chosen.seed)
        seconds.append(time.process_time() - began)
    sampling = subject.sampling
    levels = loaded(url).info.sigmas(sampling.steps, sampling.grid)
    calls = num_calls(sampling.sampler, levels, **sampling.options)
    print(f"{row.title}: {calls} calls, FID {fid.value:.4f} +- {fid.std_error:.4f}", flush=True)
    return Measured(row, calls, fid.value, fid.std_error, subject.checkpoint.images_seen, TIMED / min(seconds))


@functools.cache
def loaded(url: str) -> LoadedDenoiser:
    return load(url)


def drawn(row: Row, url: str, count: int, seed: int) -> torch.Tensor:
    """`count` samples of a row, classes in turn."""
    request = Request(count, row.sampler, row.steps, seed=seed, grid=row.grid, batch_size=BATCH)
    return torch.cat([samples for samples, _ in generate(loaded(url), request)])


def table(found: list[Measured]) -> list[str]:
    """Markdown; ratios are to the first row."""
    first = found[0]
    lines = [
        "| drawn | images trained on | calls | FID | of the teacher's | samples a second |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        row, ratio = one.row, one.fid / first.fid
        error = ratio * ((one.error / one.fid) ** 2 + (first.error / first.fid) ** 2) ** 0.5
        lines.append(
            f"| {row.title} | {one.images_seen:,} | {one.calls} | {one.fid:.3f} ± {one.error:.3f} | "
            f"{ratio:.2f} ± {error:.2f} | {one.samples_per_s:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
