"""Verbs for what was trained: `export`, `serve`, `evaluate`, `compare`. See `main.py`, and `sample.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scoreray.cluster.cli.options import (
    AsJson,
    AutoencoderPlace,
    Checkpoint,
    Compile,
    Ema,
    SamplerOption,
    Verbose,
    With,
    grouped,
    make_bucket,
)

if TYPE_CHECKING:
    from scoreray.sampling.metrics.plan import EvaluationSettings


def export(
    checkpoint: Checkpoint,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder or prefix, or hf://OWNER/NAME: a repository of the Hub.")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="scoreray: safetensors and model.json, for sample, serve, evaluate. diffusers: for "
            "DiffusionPipeline.from_pretrained, and these too. lora: a LoRA's adapters alone, for peft and diffusers, "
            "and these too; all others merge them into what they adapt. onnx, torch-export: the denoiser as a graph, "
            "for inference without scoreray."
        ),
    ] = "scoreray",
    ema: Annotated[
        list[str] | None,
        typer.Option(
            help="EMA length, again for more; all tracked ones if left out, 'none' for raw weights. "
            "One that was not tracked is made of the run's snapshots and checkpoints."
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option("--licence", "--license", help="For the card, README.md: apache-2.0, cc-by-4.0, ...")
    ] = "",
    samples: Annotated[int, typer.Option(help="So many samples on a sheet of the card.", min=0, max=256)] = 0,
    rows: Annotated[int, typer.Option(help="Of a graph's batch, where its network takes no other; 0: any.", min=0)] = 0,
    autoencoder: AutoencoderPlace = None,
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for inference, one file per EMA length, with a model card; here or on the Hub."""
    from scoreray.cluster.verbs.export import ExportOptions, export_model
    from scoreray.data.reading.outputs import check_folder

    check_folder(out, "OUT")
    options = ExportOptions(format, licence, samples, rows)
    make_bucket(out)
    exported = export_model(checkpoint, out, ema or [], options)
    typer.echo(json.dumps(exported.answer()) if as_json else exported.text())


def serve(
    checkpoint: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]CHECKPOINT...", help="Runs (their newest checkpoint is followed) or checkpoints."
        ),
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="A LoRA of the one checkpoint, for requests that name it as `adapter`."),
    ] = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Where to listen; others than loopback need tokens.")] = "127.0.0.1",
    token_file: Annotated[Path | None, typer.Option(help="Lines name:token; or set SCORERAY_TOKENS.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve everybody who can reach the host.")] = False,
    replicas: Annotated[str, typer.Option(help="How many, or MIN,MAX.")] = "1",
    max_batch: Annotated[int, typer.Option(help="Rows of one call of the network.", min=2)] = 32,
    max_models: Annotated[int, typer.Option(help="Weights in a replica's memory at once.", min=2)] = 4,
    ema: Annotated[str | None, typer.Option(help="Default EMA length; requests may name another.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16; auto measures what bf16 changes.")] = "auto",
    compile_: Compile = "auto",
    cpus_per_replica: Annotated[float, typer.Option(min=0)] = 1.0,
    gpus_per_replica: Annotated[float, typer.Option(min=0)] = 0.0,
    threads: Annotated[int | None, typer.Option(help="Of a replica's network on CPUs.", min=1)] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Several steps a call for a lone request of few samples, on GPUs.")
    ] = False,
    reload_s: Annotated[float, typer.Option(help="How often a run is asked for a newer checkpoint.", min=0.1)] = 10.0,
    drain_s: Annotated[float, typer.Option(help="At the end, for requests under way.", min=0)] = 60.0,
    limit: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, e.g. max_count=64; see docs/serving.md.")] = None,
    sampler: Annotated[
        list[str] | None, typer.Option(help="package.module:Name, a sampler of yours that requests may name too.")
    ] = None,
    autoencoder: AutoencoderPlace = None,
    with_: With = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer sampling requests over HTTP. Ctrl-C or SIGTERM drains, then ends with 0 (130 if requests were cut off)."""
    from scoreray.cluster.serve.command import serve_until_stopped
    from scoreray.cluster.serve.options import ServeOptions
    from scoreray.sampling.model.fast import check_choices

    check_choices(precision, compile_)
    options = ServeOptions(
        checkpoints=checkpoint,
        lora=lora or [],
        replicas=replicas,
        ema=ema,
        max_batch=max_batch,
        max_models=max_models,
        precision=precision,  # type: ignore[arg-type]
        compile=compile_,
        cpus_per_replica=cpus_per_replica,
        gpus_per_replica=gpus_per_replica,
        threads=threads,
        parallel=parallel,
        reload_s=reload_s,
        drain_s=drain_s,
        limit=limit or [],
        no_auth=no_auth,
        samplers=sampler or [],
    )
    config, placement = options.checked(host, port, token_file)

    def ready(url: str) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "models": dict(config.models)}))

    if serve_until_stopped(config, placement, ready, verbose=verbose):
        sys.exit(130)


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, on how many samples, and how these are drawn: names and defaults as in EvaluationSettings."""

    reference: Annotated[str, typer.Option(help="The packed data set that it is measured against.")]
    metrics: Annotated[
        str,
        typer.Option(
            help="Names with commas between, such as fid,kid,bpd, or package.module:Name; default: those that fit and "
            "are cheap, some of features: data without classes need --extractor then. docs/evaluation.md has all."
        ),
    ] = ""
    metric_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC.NAME=VALUE", help="Of a metric, e.g. kde.kernel=tophat; again for more. docs/evaluation.md."
        ),
    ] = None
    out: Annotated[str, typer.Option(help="Where records go; default: evaluations/ in the run.")] = ""
    cache: Annotated[str, typer.Option(help="Extractors and reference features; default: cache/ in --out.")] = ""
    extractor: Annotated[
        str,
        typer.Option(
            help="auto, classifier, identity, a file: Inception-v3's weights, TorchScript (runs code); or "
            "package.module:Name."
        ),
    ] = "auto"
    count: Annotated[int, typer.Option(help="Samples to draw.")] = 10_000
    reference_count: Annotated[int, typer.Option(help="Samples of the reference, evenly over it.")] = 50_000
    likelihood_count: Annotated[int, typer.Option(help="Samples of the reference for bpd and nats.")] = 128
    loss_count: Annotated[int, typer.Option(help="Samples of the reference for loss.")] = 1024
    restoration_count: Annotated[int, typer.Option(help="Samples of the reference for psnr and ssim.")] = 128
    restoration: Annotated[
        str,
        typer.Option(
            help="For mse, psnr and ssim: superresolution=FACTOR, inpaint, gray, or reconstruction, from codes."
        ),
    ] = "superresolution=2"
    codes_count: Annotated[int, typer.Option(help="Samples of the reference for representations.")] = 2000
    codes: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="How a denoiser encodes them: sampler, steps, rtol; layer, sigma; conditions, as for encode.",
        ),
    ] = ""
    ensembles: Annotated[
        int, typer.Option(help="Samples of the reference whose conditions are requested: for crps, rmse, match, ...")
    ] = 64
    per_condition: Annotated[int, typer.Option(help="Members that are drawn under each of these conditions.")] = 16
    scorer: Annotated[
        str, typer.Option(help="For match: package.module:Name, which scores samples under what was requested.")
    ] = ""
    sampler: Annotated[str | None, typer.Option(help="As for sample; default: what fits the model.")] = None
    steps: Annotated[int | None, typer.Option(help="Noise levels, or Gibbs sweeps.", min=1)] = None
    grid: Annotated[str | None, typer.Option(help="Noise levels, as for sample.")] = None
    max_calls: Annotated[
        int | None, typer.Option(metavar="N", help="Network calls a sample at most, as for sample.", min=1)
    ] = None
    seed: Annotated[int, typer.Option(help="Of the samples.", min=0)] = 0
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0
    ema: Ema = None
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64
    option: SamplerOption = None
    rtol: Annotated[float, typer.Option(help="Tolerance of the likelihood's solver.")] = 1e-5

    def settings(self, checkpoint: str, threads: int) -> EvaluationSettings:
        from scoreray.data.yaml_text import parse_metric_options, parse_options
        from scoreray.sampling.metrics.plan import EvaluationSettings

        given = {one.name: getattr(self, one.name) for one in fields(self) if not one.name.endswith("option")}
        given["metrics"] = tuple(name.strip() for name in self.metrics.split(",") if name.strip())
        given["metric_options"] = parse_metric_options(self.metric_option or [])
        return EvaluationSettings(checkpoint, **given, options=parse_options(self.option or []), threads=threads)


@grouped
def evaluate(
    *,
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="URL of a run, of one checkpoint in it, or of an exported model."),
    ],
    measured: EvaluateOptions,
    workers: Annotated[
        int | None, typer.Option(help="Ray actors; default: what the cluster has room for.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each worker; part of the record.", min=1)] = 1,
    autoencoder: AutoencoderPlace = None,
    with_: With = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model: a record to compare, a page to look at. The same command again goes on, or finds it."""
    from scoreray.cluster.verbs.evaluate import evaluate_on_ray
    from scoreray.data.reading.outputs import check_folder

    settings = measured.settings(checkpoint, threads)
    check_folder(measured.out, "--out")
    check_folder(measured.cache, "--cache")
    make_bucket(measured.out)
    evaluation = evaluate_on_ray(settings, workers=workers, verbose=verbose)
    typer.echo(json.dumps(evaluation.answer()) if as_json else evaluation.text())


def compare(
    first: Annotated[str, typer.Argument(metavar="A.json", help="The record of an evaluation (record.json).")],
    second: Annotated[str, typer.Argument(metavar="B.json", help="Another one.")],
    metrics: Annotated[str, typer.Option(help="Only these; default: all that both have.")] = "",
    vary: Annotated[str, typer.Option(help="Settings of sampling that are meant to differ: sampler,steps,...")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations; exit status 2, naming what differs, when their numbers can't be compared."""
    from scoreray.sampling.evaluation.compare import compare as compared
    from scoreray.sampling.evaluation.compare import comparison_text, notes
    from scoreray.sampling.metrics.record import read_record

    a, b = read_record(first), read_record(second)
    found = compared(a, b, *([part for part in text.split(",") if part] for text in (metrics, vary)))
    beside = notes(a, b)
    if as_json:
        typer.echo(json.dumps({"metrics": {name: one.to_json() for name, one in found.items()}, "notes": beside}))
    else:
        typer.echo(comparison_text(found, beside))
