"""`scoreray doctor` on this machine: what a run lacks and what will not fit, before it starts."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from scoreray.cluster.finding import Finding
from scoreray.cluster.verbs.beside_run import check_beside
from scoreray.data.errors import ScorerayError, UserError
from scoreray.data.units import counted_noun
from scoreray.data.unpacked.tars import UnpackedTars
from scoreray.trainer.config import Config
from scoreray.trainer.config.data_scale import misfit
from scoreray.trainer.config.run_fields import RunFields, run_fields
from scoreray.trainer.engine import resolve_precision
from scoreray.trainer.engine.deepspeed import bucket_sizes
from scoreray.trainer.engine.planner import NODE_RANKS, Memory, activation_bytes, advise, memory, memory_of_rank
from scoreray.trainer.initial import begins_from, find_initial, initial_weights
from scoreray.trainer.networks.network import build_network, num_parameters
from scoreray.trainer.run_data import RunData, open_run_data
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.step import build_training_module
from scoreray.trainer.teacher import fitting_teacher

PARTS = ("weights", "gradients", "masters", "moments", "averages", "buffers", "activations")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Machine:
    """What a run is to be planned for where this machine is not it; None: as on this one."""

    memory_bytes: int | None = None
    num_nodes: int | None = None
    image_shape: tuple[int, ...] | None = None


def examine(config: Config | None, machine: Machine | None = None) -> list[Finding]:
    """Everything that can be found out without starting anything."""
    machine = machine or Machine()
    found = [software(), devices()]
    if config is None:
        return found
    data, fields, about_data = data_set(config)
    found += [about_data, storage(config)]
    shape = machine.image_shape or (tuple(fields.shape) if fields else None)
    if shape is None:
        text = "can't be planned without the samples' shape; fix data.url, or give --shape 3x64x64"
        return [*found, Finding("memory", "problem", text)]
    return [
        *found,
        *initial(config, fields),
        *teacher(config, fields),
        *evaluation(config, data),
        *plan(config, fields, shape, machine),
    ]


def software() -> Finding:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "ray", "deepspeed", "webdataset")}
    return Finding("software", "good", ", ".join(f"{name} {v}" for name, v in versions.items()), versions)


def devices() -> Finding:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{os.cpu_count()} CPU cores, {_gib(total)}, " + (f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU")
    return Finding("this machine", "good", text, {"cpus": os.cpu_count(), "memory_bytes": total, "gpus": gpus})


def data_set(config: Config) -> tuple[RunData | None, RunFields | None, Finding]:
    try:
        data = open_run_data(config, patient=False)
        fields = run_fields(config.data, data, config.autoencoder, config.alignment)
        shape, found = "x".join(map(str, fields.shape)), misfit(config, fields)
    except ScorerayError as error:
        return None, None, Finding("data", "problem", str(error))
    classes = f"{len(data.classes)} classes"
    if isinstance(data, UnpackedTars):
        text = f"{len(data.tars):,} tars without a manifest, samples of {shape}, {classes}"
    else:
        text = f"{data.num_samples:,} samples of {shape}, {classes}"
    facts = {"num_samples": data.num_samples, "sigma_data": data.sigma_data}
    if found:
        state: Literal["note", "problem"] = "problem" if found.hopeless else "note"
        return data, fields, Finding("data", state, f"{text} at {config.data.url}; {found.text}", facts)
    if isinstance(data, UnpackedTars):
        text = "; ".join([f"{text} at {config.data.url}", *data.notes()])
        return data, fields, Finding("data", "note", text, facts)
    return data, fields, Finding("data", "good", f"{text} at {config.data.url}", facts)


def initial(config: Config, fields: RunFields | None) -> list[Finding]:
    """What the run begins from, where the config names a model and the data set can be read."""
    if fields is None:
        return []
    try:
        model = find_initial(config)
        if model is None:
            return []
        found = initial_weights(model, config, fields)
    except ScorerayError as error:
        return [Finding("init", "problem", str(error))]
    return [Finding("init", "note" if found.misfits else "good", begins_from(model, found))]


def teacher(config: Config, fields: RunFields | None) -> list[Finding]:
    """What the run learns from, where the config names a model and the data set can be read."""
    try:
        model = None if fields is None else fitting_teacher(config, fields, None)
    except ScorerayError as error:
        return [Finding("teacher", "problem", str(error))]
    return [] if model is None else [Finding("teacher", "good", f"learns from {model.lineage()[0].text()}")]


def evaluation(config: Config, data: RunData | None) -> list[Finding]:
    """What is measured beside the run, where the config names anything and its data set can be read."""
    if data is None:
        return []
    try:
        check_beside(config, data)
    except ScorerayError as error:
        return [Finding("evaluation", "problem", str(error))]
    section = config.evaluation
    if not section.metrics:
        return []
    return [Finding("evaluation", "good", f"{', '.join(section.metrics)} against {section.reference or 'data.url'}")]


def storage(config: Config) -> Finding:
    try:
        run = run_store(config)
        run.check_reachable()
        run.check_writable()
    except ScorerayError as error:
        return Finding("storage", "problem", str(error))
    text = f"{run.url()} can be written"
    place = config.run.storage
    if "://" not in place and not os.path.isdir(place):
        text += f"; {place} is not there yet and will be made"
    return Finding("storage", "good", text)


def plan(config: Config, fields: RunFields | None, shape: tuple[int, ...], machine: Machine) -> list[Finding]:
    """Memory of each ZeRO stage, what fits, what to set, and how much the run will keep."""
    try:
        module, network = _built(config, fields, shape)
    except UserError as error:
        return [Finding("network", "problem", str(error))]
    num_params = num_parameters(module)
    num_frozen = sum(parameter.numel() for parameter in module.parameters()) - num_params
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        half = config.engine.precision != "fp32"
    else:
        half = resolve_precision(config.engine.precision, device) != torch.float32
    rows, activations = _activations(config, network, shape, half)
    workers = config.scaling.range[0]
    num_nodes = machine.num_nodes or (math.ceil(workers / NODE_RANKS) if config.scaling.use_gpu else 1)
    if workers % num_nodes:
        raise UserError(f"--nodes {num_nodes}: does not divide the run's {workers} workers")
    plans = {
        (stage, offload): memory(
            num_params,
            stage,
            workers,
            half=half,
            num_averages=len(config.ema.names),
            offload=offload,
            activations=activations,
            bucket_elements=bucket_sizes(num_params, stage)["reduce_bucket_size"] if stage else 0,
            num_frozen=num_frozen,
        )
        for stage in (0, 1, 2, 3)
        for offload in ((False, True) if stage else (False,))
    }
    facts = {
        "num_params": num_params,
        "num_frozen": num_frozen,
        "workers": workers,
        "nodes": num_nodes,
        "precision": "bf16" if half else "fp32",
        "micro_batch_size": rows,
        "stages": [
            asdict(p) | {"total": p.total, "bytes_per_parameter": p.state / max(num_params, 1), "offload": offload}
            for (_, offload), p in plans.items()
        ],
    }
    frozen = f" and {num_frozen:,} frozen" if num_frozen else ""
    head = (
        f"{num_params:,} parameters{frozen} in {facts['precision']}, {counted_noun(workers, 'worker')} on "
        f"{counted_noun(num_nodes, 'node')}, {rows} rows a forward pass, {len(config.ema.names)} averages; "
        "a rank's peak:"
    )
    state: Literal["good", "note"] = "good"
    if fields is None and config.data.conditions:
        state, head = "note", f"without what data.conditions add, whose sizes only the data set knows: {head}"
    findings = [Finding("memory", state, head + "\n" + table(plans, num_params), facts)]
    findings.append(_fits(config, plans, machine, workers, num_nodes, rows))
    findings.append(_kept(config, num_params, num_frozen))
    return findings


def _built(config: Config, fields: RunFields | None, shape: tuple[int, ...]) -> tuple[torch.nn.Module, Any]:
    """(all that is trained, the network) for samples of `shape` on the meta device. Raises UserError."""
    with torch.device("meta"):
        if fields is None:
            network: Any = build_network(config.network, shape, {})
            return network, network
        module: Any = build_training_module(config, replace(fields, shape=list(shape)))
    return module, module.denoiser.network


def _activations(config: Config, network: Any, shape: tuple[int, ...], half: bool) -> tuple[int, float]:
    """Rows of one forward pass on a rank, and the bytes that it keeps."""
    rows = config.data.global_batch_size // config.scaling.range[0]
    rows = config.engine.micro_batch_size or rows
    try:
        every, recomputed = activation_bytes(network, shape, torch.bfloat16 if half else torch.float32)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError):
        return rows, 0.0  # an energy, an RBM, somebody else's autoencoder: no forward pass of this form
    inner = getattr(config.network, "network", config.network)  # of one on a ladder
    return rows, float(rows * (recomputed if getattr(inner, "activation_checkpointing", False) else every))


def _fits(
    config: Config, plans: dict[tuple[int, bool], Memory], machine: Machine, workers: int, num_nodes: int, rows: int
) -> Finding:
    gpu = config.scaling.use_gpu
    if machine.memory_bytes is not None:
        available: float = machine.memory_bytes
    elif gpu and not torch.cuda.is_available():
        return Finding(
            "fit", "note", "no GPU is in this machine: give what a rank has with --memory, e.g. --memory 80G"
        )
    else:
        available = memory_of_rank(torch.device("cuda" if gpu else "cpu"))
        if not gpu and "RAY_ADDRESS" not in os.environ:
            available /= workers
    plans = {(s, o): plan for (s, o), plan in plans.items() if s <= config.max_zero_stage}
    advice = advise(plans, available, world_size=workers, num_nodes=num_nodes)
    facts = {"memory_bytes": available, **asdict(advice)}
    if advice.stage is None:
        text = f"no stage fits a rank: {advice.why}; more workers, a smaller engine.micro_batch_size (now {rows}), or "
        return Finding("fit", "problem", text + "network.activation_checkpointing", facts)
    stage, offload = config.engine.zero_stage, config.engine.offload != "none"
    setting = f"engine.zero_stage={advice.stage}"
    setting += " engine.offload=optimizer" if advice.offload else ""
    setting += f" engine.partition_group={advice.partition_group}" if advice.partition_group > 1 else ""
    chosen = plans.get((advice.stage if stage == "auto" else stage, offload))
    if chosen is not None and chosen.total > available:
        text = f"engine.zero_stage {stage} needs {_gib(chosen.total)}, a rank has {_gib(available)}; set {setting}"
        return Finding("fit", "problem", text, facts)
    return Finding("fit", "good", f"{setting} is the quickest that fits a rank: {advice.why}", facts)


def _kept(config: Config, num_params: int, num_frozen: int) -> Finding:
    """Bytes that the run leaves in its storage."""
    k, checkpoint, images = len(config.ema.names), config.checkpoint, config.duration.images
    num_frozen = 0 if config.lora is not None else num_frozen  # a LoRA's checkpoints hold its adapters alone
    each = num_params * 4 * (3 + k) + num_frozen * 4
    text = f"a checkpoint is {_gib(each)}, {checkpoint.keep} are kept"
    facts = {"checkpoint_bytes": each, "kept": checkpoint.keep, "snapshot_bytes": 0, "snapshots": 0}
    if checkpoint.snapshot_every_images:
        count = images // max(checkpoint.snapshot_every_images, checkpoint.every_images)
        half = num_params * 2 * k + num_frozen * 2
        text += f"; {count:,} snapshots of the averages, {_gib(half)} each, will be {_gib(half * count)} at the end"
        facts |= {"snapshot_bytes": half, "snapshots": count}
    return Finding("kept", "good", text, facts)


def table(plans: dict[tuple[int, bool], Memory], num_params: int) -> str:
    """A row for each plan: bytes per parameter of the state, then GiB of each part."""
    lines = [f"  {'':17}{'B/param':>8}" + "".join(f"{part:>13}" for part in PARTS) + f"{'total':>13}{'on host':>13}"]
    for (stage, offload), p in sorted(plans.items(), key=lambda item: (item[0][1], item[0][0])):
        name = f"ZeRO-{stage}" + (", offloaded" if offload else "")
        row = "".join(f" {_gib(getattr(p, part)):>12}" for part in PARTS)
        lines.append(f"  {name:17}{p.state / num_params:8.2f}{row} {_gib(p.total):>12} {_gib(p.host):>12}")
    return "\n".join(lines)


def parse_bytes(text: str) -> int:
    """ "80G", "80GiB", "512M": powers of 1024. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text}: write a size such as 80G or 512M")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3x64x64" as (3, 64, 64). Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise UserError(f"--shape {text}: write channels, height and width such as 3x64x64")
    return tuple(map(int, text.split("x")))


def _gib(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB" or (unit == "GiB" and num_bytes < 10_000):
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
