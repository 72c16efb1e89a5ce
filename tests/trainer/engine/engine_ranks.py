"""One rank of a small sharded training, a process of test_engine.py: `engine_ranks.py RANK WORLD FOLDER PORT`.

For every case it trains a few steps, saves a checkpoint into FOLDER, and restores what another case saved.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[1]}

import torch
import torch.distributed as dist

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.storage.store import open_store
from scoreray.trainer import loop
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.levels import with_levels
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.engine import build_engine
from scoreray.trainer.engine import deepspeed as by_deepspeed
from scoreray.trainer.engine.base import resolve_precision
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.networks.autoencoder import AutoencoderConfig
from scoreray.trainer.networks.conditioning import TextEncoderConfig
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.consistency import ConsistencyObjective
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.objectives.flow_maps import MeanFlowObjective
from scoreray.trainer.objectives.teacher import Teacher
from scoreray.trainer.optim.sgld import SGLDConfig
from scoreray.trainer.step import AutoencoderModule, TrainingModule

RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
BATCH, STEPS = 24, 4
FEW_STEPS = 2  # of the larger modules: the second one's gradient is that of weights which the first one has moved


def config(stage: int, precision: str = "fp32", micro: int | None = None, offload: str = "none"):
    return load_config(
        {
            "run": {"name": "x", "storage": str(FOLDER)},
            "data": {"url": "nowhere", "global_batch_size": BATCH},
            "duration": {"images": BATCH * STEPS},
            "optimizer": {"learning_rate": 0.01, "gradient_clip": 0.25, "weight_decay": 0.01},
            "ema": {"half_life_images": 60},
            "engine": {"zero_stage": stage, "precision": precision, "micro_batch_size": micro, "offload": offload},
            "scaling": {"workers": WORLD},
        }
    )


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(7, 31), torch.nn.SiLU(), torch.nn.Linear(31, 29), torch.nn.SiLU(), torch.nn.Linear(29, 3)]
    module = torch.nn.Sequential(*layers)
    module.register_buffer("frequencies", torch.randn(5))
    return module


def engine_of(module, case):
    gc.freeze()  # ZeRO-3 collects garbage at each start, and would look through all that earlier cases left
    device = torch.device("cpu")
    parts = case.engine, case.optimizer.for_run(0, 100), case.ema
    return build_engine(module, *parts, global_batch_size=BATCH, world_size=WORLD, device=device)


def train(case, first: int = 0, steps: int = STEPS, engine=None, poison: bool = False):
    module = network()
    engine = engine or engine_of(module, case)
    norms = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 3, generator=generator)
        rows = slice(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
        x, y = x[rows], y[rows]
        if poison and RANK == WORLD - 1:
            x[0] = float("nan")
        for xs, ys in zip(x.chunk(engine.num_micro_batches), y.chunk(engine.num_micro_batches), strict=True):
            out = engine.module(xs.to(next(engine.module.parameters()).dtype))
            engine.backward((out.float() - ys).square().mean())
        norms.append(engine.step(0.01, case.ema.decays(step + 1, BATCH)))
    return engine, module, norms


CONDITIONS = {
    "label": ConditionSpec("class", classes=("a", "b", "c")),
    "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (0.0, 1.0), (1.0, 2.0))),
    "coarse": ConditionSpec("concat", (1, 2, 2)),
    "tokens": ConditionSpec("sequence", (3, 2)),
    "caption": ConditionSpec("text", (4,)),
}


TEXT = TextEncoderConfig(8, 1, 2)
UNET = UNetConfig(8, (1,), 1, (4,), activation_checkpointing=True, text_encoder=TEXT)
DIT = DiTConfig(2, 8, 1, 2, activation_checkpointing=True, text_encoder=TEXT)  # under ZeRO-3 each module costs time


def train_conditioned(case, network, objective, guidance: float | None = None) -> list[float]:
    """Norms of a few steps of a network with cross-attention that recomputes its activations, given conditions.
    guidance: of a teacher with the same network and other weights, if there is one."""
    torch.manual_seed(0)
    module = TrainingModule(
        Denoiser(network.build((1, 4, 4), with_levels(CONDITIONS, objective.levels))), objective, EDM(), seed=0,
        global_batch_size=BATCH, dropout={"place": 0.3},
    )  # fmt: skip
    if guidance is not None:
        torch.manual_seed(1)
        teacher = Denoiser(network.build((1, 4, 4), CONDITIONS))
        for parameter in teacher.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        module.teacher = Teacher(teacher.to(resolve_precision(case.engine.precision, torch.device("cpu"))), guidance)
    engine, norms = engine_of(module, case), []
    for step in range(FEW_STEPS):
        g = torch.Generator().manual_seed(step)
        values = {
            "label": torch.randint(0, 3, (BATCH,), generator=g),
            "caption": torch.randint(97, 123, (BATCH, 4), dtype=torch.uint8, generator=g),
        }
        for name in ("place", "coarse", "tokens"):
            values[name] = torch.randn(BATCH, *CONDITIONS[name].shape, generator=g)
        masks = {"tokens": torch.rand(BATCH, 3, generator=g) < 0.5, "caption": torch.rand(BATCH, 4, generator=g) < 0.5}
        condition, x = Condition(values, masks), torch.randn(BATCH, 1, 4, 4, generator=g)
        mine = torch.arange(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
        for rows in mine.chunk(engine.num_micro_batches):
            loss, _ = engine.module(x[rows], condition[rows], rows + step * BATCH)
            engine.backward(loss.mean())
        norms.append(engine.step(0.01, case.ema.decays(step + 1, BATCH)))
    return norms


def train_autoencoder(case) -> list[float]:
    """Norms of a few steps of an autoencoder with attention, which recomputes its activations."""
    torch.manual_seed(0)
    network = AutoencoderConfig(8, (1, 2), 1, latent_channels=2, head_channels=8, activation_checkpointing=True)
    module = AutoencoderModule(network.build((1, 4, 4)), AutoencodingObjective(kl_weight=0.1), seed=0)
    engine, norms = engine_of(module, case), []
    for step in range(FEW_STEPS):
        x = torch.randn(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        mine = torch.arange(RANK * BATCH // WORLD, (RANK + 1) * BATCH // WORLD)
        for rows in mine.chunk(engine.num_micro_batches):
            loss, _ = engine.module(x[rows], None, rows + step * BATCH)
            engine.backward(loss.mean())
        norms.append(engine.step(0.01, case.ema.decays(step + 1, BATCH)))
    return norms


def save(engine, module, where: Path) -> None:
    writer = CheckpointWriter(open_store(where), attempt="a", rank=RANK, world_size=WORLD, keep=1)
    fragments = list(engine.fragments()) if RANK == 0 or not engine.replicated else []
    shapes = {name: list(p.shape) for name, p in network().named_parameters()}
    state_keys = list(engine.optimizer.state_keys)
    writer.save(Marker(BATCH * STEPS, STEPS, {}, shapes, state_keys, {}, 1), fragments, module)
    writer.wait()
    writer.close()
    if WORLD > 1:
        dist.barrier()


CASES = {
    "flat": config(0),
    "flat-micro": config(0, micro=6),
    "zero1": config(1),
    "zero2": config(2),
    "zero2-micro": config(2, micro=6),
    "zero3": config(3),
    "zero2-offload": config(2, offload="optimizer"),
    "flat-bf16": config(0, "bf16"),
    "zero1-bf16": config(1, "bf16"),
    "zero2-bf16": config(2, "bf16"),
    "zero3-bf16": config(3, "bf16"),
}


SGLD = {
    f"sgld{stage}": config(stage).model_copy(update={"optimizer": SGLDConfig(preconditioned=True, eps=0.1)})
    for stage in (0, 1, 2, 3)
}


CONDITIONED = ("flat", "flat-micro", "zero1", "zero2-micro", "zero2-offload", "zero3", "zero3-bf16")
# Of other modules: what differs in their forward and backward passes. ZeRO-1 and offloading differ in the step alone.
OTHERS = ("flat-micro", "zero2-micro", "zero3", "zero3-bf16")


BEGUN = {"flat": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3-bf16": 3}


def train_from_another(name: str) -> None:
    """Two steps of a run that knows a class more than the one it begins from, and trains a part of it; then two of a
    LoRA, the second after a start from the checkpoint of the first."""
    base = {
        "run": {"name": "base", "storage": str(FOLDER)},
        "data": {"url": str(FOLDER / "3-classes"), "global_batch_size": 16},
        "network": {"kind": "mlp", "hidden_size": 12, "num_layers": 2},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "optimizer": {"learning_rate": 0.01},
        "duration": {"images": 32},
    }
    if WORLD == 1:
        loop.train(load_config(base))
    tuned = {
        **base,
        "run": {"name": f"begun-{name}-{WORLD}", "storage": str(FOLDER)},
        "data": {"url": str(FOLDER / "4-classes"), "global_batch_size": 16},
        "engine": {"zero_stage": BEGUN[name], "precision": "bf16" if "bf16" in name else "fp32"},
        "init": {"checkpoint": str(FOLDER / "base")},
        "optimizer": {"learning_rate": 1e-3, "frozen": ["first.*", "layers.*", "!layers.*.modulation.*"]},
        "scaling": {"workers": WORLD},
    }
    loop.train(load_config(tuned), rank=RANK, world_size=WORLD)
    for images in (16, 32):
        lora = {
            **tuned,
            "run": {"name": f"lora-{name}-{WORLD}", "storage": str(FOLDER)},
            "data": base["data"],
            "lora": {"rank": 2},
            "optimizer": {"learning_rate": 1e-3},
            "duration": {"images": images},
        }
        loop.train(load_config(lora), rank=RANK, world_size=WORLD)


def refusal(stage: int, name: str, value: object) -> str:
    """What is said of a DeepSpeed that differs in one of the names that are not documented."""
    holder: object = by_deepspeed if hasattr(by_deepspeed, name) else by_deepspeed.DeepSpeedEngine
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        engine_of(network(), config(stage))
    except UserError as error:
        return str(error)
    finally:
        setattr(holder, name, original)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    if WORLD > 1:
        port = sys.argv[4]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=RANK, world_size=WORLD)
    facts = {}
    names = CASES if WORLD == 2 else ["flat"]
    for name in names:
        engine, module, norms = train(CASES[name])
        save(engine, module, FOLDER / f"{name}-{WORLD}")
        facts[name] = {"norms": norms}
        try:
            train(CASES[name], first=STEPS, steps=1, engine=engine, poison=True)
        except NonFiniteError:
            facts[name]["refused"] = True
        save(engine, module, FOLDER / f"{name}-{WORLD}-after-refusal")
        facts[name]["next norm"] = train(CASES[name], first=STEPS, steps=1, engine=engine)[2][0]
    for name in SGLD if WORLD == 2 else ("sgld0",):
        engine, module, _ = train(SGLD[name])
        save(engine, module, FOLDER / f"{name}-{WORLD}")
    for name in CONDITIONED if WORLD == 2 else ("flat",):
        facts[f"{name}, conditions"] = train_conditioned(CASES[name], UNET, EDMObjective(label_dropout=0.2))
        if WORLD == 2 and name not in OTHERS:
            continue
        facts[f"{name}, flow map"] = train_conditioned(CASES[name], DIT, MeanFlowObjective(label_dropout=0.2))
        student = ConsistencyObjective(label_dropout=0.2, stage_images=BATCH, metric="squared")
        facts[f"{name}, student"] = train_conditioned(CASES[name], DIT, student, guidance=2.0)
        facts[f"{name}, autoencoder"] = train_autoencoder(CASES[name])
    for name in BEGUN if WORLD == 2 else ("flat",):
        train_from_another(name)
    if WORLD == 2:
        facts["refusals"] = [
            refusal(3, "PARTITIONS", "absent"),
            refusal(
                2, "_partitions", lambda self: [torch.zeros_like(p) for p in self.optimizer.param_groups[0]["params"]]
            ),
            refusal(1, "_partitions", lambda self: [p[1:] for p in self.optimizer.param_groups[0]["params"]]),
        ]
    # A checkpoint of any case continues in any other: same masters, moments and averages, then the same next step.
    for source in ("flat-1", "zero3-2") if WORLD == 2 else ():
        for name in ("flat", "zero1", "zero2", "zero3"):
            module = network()
            engine = engine_of(module, CASES[name])
            checkpoint = latest(open_store(FOLDER / source))
            checkpoint.restore(engine.fragments(), module)
            engine.publish(checkpoint.num_steps)
            save(engine, module, FOLDER / f"{source}-in-{name}")
            _, _, norms = train(CASES[name], first=STEPS, steps=1, engine=engine)
            facts[f"{source}-in-{name}"] = {"norms": norms}
    if RANK == 0:
        (FOLDER / f"facts-{WORLD}.json").write_text(json.dumps(facts))
    if WORLD > 1:
        dist.barrier()


main()
os._exit(0)  # not through the interpreter's end: gloo's and DeepSpeed's threads abort it now and then
