"""The `scoreray` command: one verb each, one line for a mistake, an exit status that scripts can use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

# Before torch is imported: threads that spin while they wait make a busy machine crawl, and sleeping ones cost little.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from scoreray.cluster.local_ray import stop
from scoreray.data.errors import ScorerayError, UserError

ClickException: Any = typer.BadParameter.__mro__[2]  # typer brings its own copy of click, under a private name
_servers: list[Any] = []  # the S3 server of --local-s3, while it runs
STOPPED = "stopped; the same command goes on from what is committed"

app = typer.Typer(
    name="scoreray",
    help="Train score-based generative models on Ray, draw samples from them. A URL is s3://bucket/prefix or a path.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Pack, check and look at data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides: optimizer.learning_rate=1e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show what Ray and its workers print.")]


@app.callback()
def common(
    context: typer.Context,
    local_s3: Annotated[
        Path | None,
        typer.Option(
            envvar="SCORERAY_LOCAL_S3",
            help="Run an S3 server on this folder while the command runs, and send s3:// there.",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("scoreray"))
        raise typer.Exit
    if local_s3 is not None:
        context.with_resource(_local_s3(local_s3))


@contextlib.contextmanager
def _local_s3(folder: Path) -> Iterator[None]:
    from scoreray.data.local_s3 import LocalS3

    with LocalS3(folder) as server:
        os.environ.update(server.env)
        _servers.append(server)
        yield


def _make_bucket(url: str) -> None:
    """On a server of our own (--local-s3), the bucket of a URL that is about to be written to."""
    if _servers and url.startswith("s3://"):
        _servers[-1].create_bucket(url[5:].partition("/")[0])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option(help="Seconds instead of minutes; the samples are then blurs.")] = False,
    workers: Annotated[int, typer.Option(help="Training workers.", min=1, max=16)] = 2,
    fresh: Annotated[bool, typer.Option(help="Start over where a demo has already run in this folder.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The whole line on this machine: pack, train on Ray from S3, draw samples, show them."""
    from scoreray.cluster.demo import run_demo

    result = run_demo(out, quick=quick, workers=workers, fresh=fresh, verbose=verbose)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Start over under the next unused name (name-2, ...).")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the config and what it names.")] = False,
    print_config: Annotated[bool, typer.Option(help="Print the whole config, defaults included, and stop.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a score network. The same command again goes on from the newest committed checkpoint."""
    from scoreray.trainer.config import dump_config, load_config

    loaded = load_config(config, overrides or ())
    if print_config:
        typer.echo(dump_config(loaded), nl=False)
        return
    from scoreray.cluster.training import train_to_end
    from scoreray.trainer.run import check_run, prepare_run

    if check:
        check_run(loaded)
        typer.echo(f"{config}: good")
        return
    _make_bucket(loaded.run.storage)
    result = train_to_end(prepare_run(loaded, fresh=fresh), verbose=verbose)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A sweep's YAML file, see configs/tune/.")],
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the sweep and what it names.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search noise schedules, weightings, anything a config has. The same command again goes on where it was."""
    from scoreray.cluster.tuning import check_tune, tune_to_end
    from scoreray.tune.sweep import load_sweep

    plan = load_sweep(config, overrides or ())
    if check:
        check_tune(plan)
        typer.echo(f"{config}: good")
        return
    _make_bucket(plan.sweep.study.storage)
    result = tune_to_end(plan, verbose=verbose)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="URL of a run, or of one checkpoint in it.")],
    out: Annotated[str, typer.Option(help="A folder or prefix, or a .npz. The same command again goes on there.")],
    count: Annotated[int, typer.Option(help="How many samples.", min=1)] = 64,
    format: Annotated[
        str,
        typer.Option(help="png, npz or webdataset (shards with a manifest); auto: webdataset in S3, else pictures."),
    ] = "auto",
    actors: Annotated[
        int | None,
        typer.Option(help="Draw by so many Ray actors, on RAY_ADDRESS's cluster or one here; else in-process.", min=1),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="heun, ddim, dpmpp_2m, edm_sde, ncsnv2, ...; gibbs for RBMs. Default: what fits the model."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Noise levels, 18 for heun; sweeps of gibbs, 1000 by default.", min=1)
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Noise levels as karras, geometric, linear, or process (even in its t).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Sample i of a seed is always the same picture.", min=0)] = 0,
    class_label: Annotated[str | None, typer.Option(help="A class's name or number; all in turn if left out.")] = None,
    guidance: Annotated[
        float, typer.Option(help="Weight of guidance: 1 is none, 2 strengthens the class (classifier-free).")
    ] = 1.0,
    autoguide: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Guide by this weaker model instead (autoguidance).")
    ] = None,
    guide_ema: Annotated[
        str | None, typer.Option(help="Guide by this EMA length, of the same model or of --autoguide's.")
    ] = None,
    interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Guide between these noise levels only.")
    ] = None,
    inpaint: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Keep what --mask marks of this png, jpg or npz; draw the rest.")
    ] = None,
    mask: Annotated[str | None, typer.Option(metavar="MASK", help="For --inpaint: bright where known.")] = None,
    inverse: Annotated[
        str | None,
        typer.Option(metavar="OPERATOR", help="superresolution=FACTOR, gray or matrix=FILE, of --measurement."),
    ] = None,
    measurement: Annotated[
        str | None, typer.Option(metavar="FILE", help="For --inverse: what was measured, png, jpg, npy or npz.")
    ] = None,
    noise_std: Annotated[float, typer.Option(help="The measurement's noise, for data in [-1, 1].")] = 0.0,
    inverse_method: Annotated[
        str, typer.Option(help="projection, or jacobian: nearer the posterior, a backward pass a call.")
    ] = "projection",
    ema: Annotated[str | None, typer.Option(help="EMA length, e.g. 0.100; 'none' for raw weights.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples that are drawn together.", min=1)] = 64,
    option: Annotated[list[str] | None, typer.Option(help="The sampler's own, e.g. s_churn=40.")] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or auto: bf16 where the count pays for compiling and it is exact enough.")
    ] = "auto",
    compile_: Annotated[str, typer.Option("--compile", help="auto, on or off: torch.compile, frozen.")] = "auto",
    samples_per_shard: Annotated[int | None, typer.Option(help="Default: by count and size.", min=1)] = None,
    picture: Annotated[Path | None, typer.Option(help="Where a grid of the first samples goes (PNG).")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Draw samples from a trained model. After a kill the same command goes on, and ends in the same bytes."""
    from scoreray.cluster.generation import sample_to
    from scoreray.sampling.generate import Request
    from scoreray.sampling.steering import Guidance, measurement_of

    request = Request(
        count=count,
        sampler=sampler,
        steps=steps,
        grid=grid,
        seed=seed,
        class_label=class_label,
        guidance=Guidance(guidance, autoguide, guide_ema, _interval(interval)),
        measurement=measurement_of(inpaint, mask, inverse, measurement, noise_std, inverse_method),
        batch_size=batch_size,
        options=_options(option or []),
    )
    _make_bucket(out)
    drawn = sample_to(
        out,
        checkpoint,
        ema,
        request,
        format=format,
        actors=actors,
        picture=picture,
        verbose=verbose,
        precision=precision,
        compile_=compile_,
        samples_per_shard=samples_per_shard,
    )
    typer.echo(json.dumps(drawn.answer()) if as_json else drawn.text())


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="URL of a run, or of one checkpoint in it.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder or prefix for safetensors and model.json.")],
    ema: Annotated[
        list[str] | None,
        typer.Option(
            help="EMA length, again for more; all tracked ones if left out, 'none' for raw weights. "
            "One that was not tracked is made of the run's snapshots and checkpoints."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for inference: safetensors, one per EMA length, and a page of JSON."""
    from scoreray.cluster.export import export_model

    _make_bucket(out)
    page = export_model(checkpoint, out, ema or [])
    if as_json:
        typer.echo(json.dumps({"out": out, **page}))
        return
    for name, about in page["files"].items():
        typer.echo(f"EMA {name}: {out.rstrip('/')}/{about['file']} ({about['bytes'] / 1e6:,.1f} MB)")
    typer.echo(f"next: scoreray sample {out} --count 64 --out samples")


@app.command()
def serve(
    checkpoint: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]CHECKPOINT...", help="Runs (their newest checkpoint is followed) or checkpoints."
        ),
    ],
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Where to listen; others than loopback need tokens.")] = "127.0.0.1",
    token_file: Annotated[Path | None, typer.Option(help="Lines name:token; or set SCORERAY_TOKENS.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve everybody who can reach the host.")] = False,
    replicas: Annotated[str, typer.Option(help="How many, or MIN,MAX.")] = "1",
    max_batch: Annotated[int, typer.Option(help="Rows of one call of the network.", min=2)] = 32,
    max_models: Annotated[int, typer.Option(help="Weights in a replica's memory at once.", min=2)] = 4,
    ema: Annotated[str | None, typer.Option(help="Default EMA length; requests may name another.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16; auto measures what bf16 changes.")] = "auto",
    compile_: Annotated[str, typer.Option("--compile", help="auto, on or off: torch.compile, frozen.")] = "auto",
    cpus_per_replica: Annotated[float, typer.Option(min=0)] = 1.0,
    gpus_per_replica: Annotated[float, typer.Option(min=0)] = 0.0,
    threads: Annotated[int | None, typer.Option(help="Of a replica's network on CPUs.", min=1)] = None,
    reload_s: Annotated[float, typer.Option(help="How often a run is asked for a newer checkpoint.", min=0.1)] = 10.0,
    drain_s: Annotated[float, typer.Option(help="At the end, for requests under way.", min=0)] = 60.0,
    limit: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, e.g. max_count=64; see docs/serving.md.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer sampling requests over HTTP. Ctrl-C or SIGTERM drains, then ends with 0 (130 if requests were cut off)."""
    from scoreray.cluster.serving import Placement, make_config, make_limits, parse_replicas, serve_until_stopped
    from scoreray.sampling.fast import check_choices

    check_choices(precision, compile_)
    placement = Placement(
        host, port, parse_replicas(replicas), cpus_per_replica, gpus_per_replica, max(128, 4 * max_batch), drain_s
    )
    config = make_config(
        checkpoint,
        token_file,
        host,
        no_auth,
        ema=ema,
        max_batch=max_batch,
        max_models=max_models,
        precision=precision,
        compile=compile_,
        threads=threads,
        reload_s=reload_s,
        limits=make_limits(limit or []),
    )

    def ready(url: str) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "models": dict(config.models)}))

    if serve_until_stopped(config, placement, ready, verbose=verbose):
        sys.exit(130)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file, see configs/.")] = None,
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one worker, e.g. 80G; default: this machine's.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines of the workers; default: 8 GPUs each.", min=1)] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of a sample, e.g. 3x64x64; default: the data set's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is missing and what will not fit before a run finds out; exit status 2 when there is a problem.

    With RAY_ADDRESS (or as `submit doctor`) every node is asked: versions, clock, disks, storage, network, token.
    """
    from dataclasses import asdict

    from scoreray.cluster.doctor import Machine, examine, parse_bytes, parse_shape
    from scoreray.trainer.config import load_config

    loaded = load_config(config, overrides or ()) if config else None
    machine = Machine(parse_bytes(memory) if memory else None, nodes, parse_shape(shape) if shape else None)
    found = examine(loaded, machine)
    if os.environ.get("RAY_ADDRESS"):
        from scoreray.cluster.local_ray import connected
        from scoreray.cluster.nodes import ask_cluster

        with connected():
            found += ask_cluster(loaded.run.storage if loaded else "")
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
    else:
        for one in found:
            typer.echo(f"{one.state:8}{one.topic}: {one.text}")
    if any(one.state == "problem" for one in found):
        raise typer.Exit(2)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def submit(
    words: Annotated[
        list[str],
        typer.Argument(metavar="VERB...", help="A verb with its words; or status ID, logs ID, stop ID, list."),
    ],
    address: Annotated[
        str | None, typer.Option(help="http(s)://HOST:PORT of the cluster's dashboard; else RAY_API_SERVER_ADDRESS.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the job; no credentials.")] = None,
    from_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VARIABLE", help="NAME is what VARIABLE is on the cluster.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the job; default: scoreray, the verb and the run's name.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a verb as a job on a remote Ray cluster: this code, its config; RAY_AUTH_TOKEN is the cluster's token.

    Options of submit stand before VERB. The same submission again resumes the run.
    """
    from scoreray.cluster.submitting import submit as submitted

    status = submitted(
        words, address=address, env=env or [], from_env=from_env or [], name=name, detach=detach, as_json=as_json
    )
    if status:
        sys.exit(status)


@app.command()
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="URL of a run, of one checkpoint in it, or of an exported model."),
    ],
    reference: Annotated[str, typer.Option(help="The packed data set that it is measured against.")],
    metrics: Annotated[
        str,
        typer.Option(
            help="Of fid,kid,is,pr,sw,nn,kde,bpd,nats,loss,psnr,ssim,ais; default: what fits and is cheap. "
            "See docs/evaluation.md."
        ),
    ] = "",
    out: Annotated[str, typer.Option(help="Where records go; default: evaluations/ in the run.")] = "",
    cache: Annotated[str, typer.Option(help="Extractors and reference features; default: cache/ in --out.")] = "",
    extractor: Annotated[
        str,
        typer.Option(help="auto, classifier, identity, or a file: Inception-v3's weights, TorchScript (runs code)."),
    ] = "auto",
    count: Annotated[int, typer.Option(help="Samples to draw.")] = 10_000,
    reference_count: Annotated[int, typer.Option(help="Samples of the reference, evenly over it.")] = 50_000,
    likelihood_count: Annotated[int, typer.Option(help="Samples of the reference for bpd and nats.")] = 128,
    loss_count: Annotated[int, typer.Option(help="Samples of the reference for loss.")] = 1024,
    restoration_count: Annotated[int, typer.Option(help="Samples of the reference for psnr and ssim.")] = 128,
    restoration: Annotated[
        str, typer.Option(help="For psnr and ssim: superresolution=FACTOR, inpaint or gray.")
    ] = "superresolution=2",
    sampler: Annotated[str | None, typer.Option(help="As for sample; default: what fits the model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Noise levels, or Gibbs sweeps.", min=1)] = None,
    grid: Annotated[str | None, typer.Option(help="Noise levels, as for sample.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.", min=0)] = 0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    ema: Annotated[str | None, typer.Option(help="EMA length, e.g. 0.100; 'none' for raw weights.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64,
    option: Annotated[list[str] | None, typer.Option(help="The sampler's own, e.g. s_churn=40.")] = None,
    rtol: Annotated[float, typer.Option(help="Tolerance of the likelihood's solver.")] = 1e-5,
    workers: Annotated[
        int | None, typer.Option(help="Ray actors; default: what the cluster has room for.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each worker; part of the record.", min=1)] = 1,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model: a record to compare, a page to look at. The same command again goes on, or finds it."""
    from scoreray.cluster.evaluating import evaluate_on_ray
    from scoreray.sampling.plan import Settings

    settings = Settings(
        checkpoint=checkpoint,
        reference=reference,
        metrics=tuple(name.strip() for name in metrics.split(",") if name.strip()),
        out=out,
        cache=cache,
        ema=ema,
        extractor=extractor,
        count=count,
        reference_count=reference_count,
        likelihood_count=likelihood_count,
        loss_count=loss_count,
        restoration_count=restoration_count,
        restoration=restoration,
        sampler=sampler,
        steps=steps,
        grid=grid,
        seed=seed,
        guidance=guidance,
        batch_size=batch_size,
        options=_options(option or []),
        rtol=rtol,
        threads=threads,
    )
    _make_bucket(out)
    evaluation = evaluate_on_ray(settings, workers=workers, verbose=verbose)
    typer.echo(json.dumps(evaluation.answer()) if as_json else evaluation.text())


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A.json", help="The record of an evaluation (record.json).")],
    second: Annotated[str, typer.Argument(metavar="B.json", help="Another one.")],
    metrics: Annotated[str, typer.Option(help="Only these; default: all that both have.")] = "",
    vary: Annotated[str, typer.Option(help="Settings of sampling that are meant to differ: sampler,steps,...")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations; exit status 2, naming what differs, when their numbers can't be compared."""
    from scoreray.sampling.record import compare as compared
    from scoreray.sampling.record import comparison_text, notes, read_record

    a, b = read_record(first), read_record(second)
    found = compared(a, b, *([part for part in text.split(",") if part] for text in (metrics, vary)))
    beside = notes(a, b)
    if as_json:
        typer.echo(json.dumps({"metrics": found, "notes": beside}))
    else:
        typer.echo(comparison_text(found, beside))


@data_app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(help="A folder of images (class = subfolder; here or in S3), .npz, IDX (.gz or not), or tars."),
    ],
    url: Annotated[str, typer.Argument(help="Where the shards and the manifest go; for tars, where they lie.")],
    image_size: Annotated[int | None, typer.Option(help="Resize the shorter side to this and crop the centre.")] = None,
    image_format: Annotated[
        str | None, typer.Option(help="png (default), jpg (lossy) or npy. With it, tars are made into new ones.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 packs all as grey, 3 as RGB. Default: as the folder's images are.")
    ] = None,
    no_classes: Annotated[bool, typer.Option("--no-classes", help="Subfolders are not classes.")] = False,
    skip_bad: Annotated[
        int, typer.Option(help="Leave out up to so many samples that can't be read; each is named.", min=0)
    ] = 0,
    samples_per_shard: Annotated[
        int | None, typer.Option(help="Samples in one shard. Default: as many as make about 64 MB.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle at packing.", min=0)] = 0,
    name: Annotated[str | None, typer.Option(help="The data set's name; default: the source's.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Shards made at once by Ray. Default: one a core, of RAY_ADDRESS's cluster if set.", min=1),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Images into WebDataset shards and a manifest. Run again after a kill, it goes on. The same source and options
    give the same bytes, whatever --workers is. Tars that lie at URL already are indexed in place."""
    from scoreray.cluster.packing import pack_with_bar

    _make_bucket(url)
    manifest, left_out = pack_with_bar(
        source,
        url,
        workers=workers,
        name=name,
        image_size=image_size,
        image_format=image_format,
        channels=channels,
        labelled=not no_classes,
        skip_bad=skip_bad,
        samples_per_shard=samples_per_shard,
        seed=seed,
    )
    if as_json:
        answer = {
            "url": url,
            "num_samples": manifest.num_samples,
            "num_shards": len(manifest.shards),
            "left_out": left_out,
        }
        typer.echo(json.dumps(answer))
    else:
        typer.echo(f"next: scoreray train CONFIG data.url={url}")


@data_app.command()
def verify(
    url: Annotated[str, typer.Argument(help="A packed data set.")],
    as_json: AsJson = False,
) -> None:
    """Check every byte of a data set against its manifest; exit status 3 when something is wrong."""
    from scoreray.cluster.display import counted
    from scoreray.data.inspect import verify as problems_of
    from scoreray.data.store import open_store

    open_store(url).check_reachable()
    with counted("verify", "samples") as progress:
        problems = problems_of(url, progress)
    if as_json:
        typer.echo(json.dumps({"url": url, "problems": problems}))
    else:
        typer.echo("\n".join(problems) if problems else f"{url}: every shard is what the manifest says")
    if problems:
        raise typer.Exit(3)


@data_app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="A packed data set.")],
    picture: Annotated[Path | None, typer.Option(help="Where the picture grid goes (PNG).")] = None,
    count: Annotated[int, typer.Option(help="Samples in the picture.", min=1, max=1024)] = 64,
    as_json: AsJson = False,
) -> None:
    """What a data set holds: counts, sizes, suggested sigma_data, sigma_max and ladder, a picture of its samples."""
    from dataclasses import asdict

    from scoreray.data.inspect import picture_grid, read_samples, summary
    from scoreray.data.store import open_store
    from scoreray.trainer.ladder import suggest_ladder
    from scoreray.trainer.step import to_unit_range

    open_store(url).check_reachable()
    found = asdict(summary(url))
    some = range(0, found["num_samples"], max(1, found["num_samples"] // 1024))
    found["ladder"] = asdict(suggest_ladder(to_unit_range(read_samples(url, some))))
    if picture is not None:
        if len(found["shape"]) != 3:
            raise UserError(f"--picture: samples of shape {list(found['shape'])} are no pictures")
        step = max(1, found["num_samples"] // count)
        try:
            picture_grid(read_samples(url, range(0, found["num_samples"], step)[:count])).save(picture)
        except OSError as error:
            raise UserError(f"--picture {picture}: can't be written: {error.strerror or error}") from None
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        shown = _number([f"{k} {_number(v)}" for k, v in value.items()] if isinstance(value, dict) else value)
        typer.echo(f"{key:13} {shown}")
    if picture is not None:
        typer.echo(f"{'picture':13} {picture}")


def _number(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = [f"... ({len(value):,} in all)"] if len(value) > 16 else []
        return ", ".join([*(_number(item) for item in value[:16]), *more])
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--interval {text}: write two noise levels, LOW,HIGH, e.g. 0.2,5") from None
    return low, high


def _options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--option {pair}: write NAME=VALUE, e.g. s_churn=40")
        options[name] = yaml.safe_load(value)
    return options


def main() -> None:
    """Entry point: runs a verb and turns what went wrong into one line and an exit status."""
    signal.signal(signal.SIGTERM, stop)
    try:
        status = app(standalone_mode=False)
    except ScorerayError as error:
        _fail(str(error), error.exit_status)
    except (typer.Abort, KeyboardInterrupt):
        _fail(STOPPED, 130)
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        _fail(error.format_message().rstrip(".") + (f"; see {context.command_path} --help" if context else ""), 2)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        traceback.print_exc()
        _fail(f"this is a bug in scoreray: {type(error).__name__}: {error}", 1)
    if status == 130:  # how typer reports Ctrl-C
        _fail(STOPPED, 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"scoreray: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
