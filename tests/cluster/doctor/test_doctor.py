"""The doctor finds what is missing and what will not fit, as a list of findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.doctor import plan
from scoreray.cluster.doctor.examine import examine
from scoreray.cluster.doctor.machine import Machine, parse_bytes, parse_shape
from scoreray.cluster.finding import Finding
from scoreray.data.errors import UserError
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.engine import planner

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """A network's FLOPs and activations, which take a second or two of a large one, are counted once for all tests."""
    counted: dict[tuple[str, str, object], Any] = {}

    def once(count: Callable[..., Any]) -> Callable[..., Any]:
        def look(network: torch.nn.Module, *about: object) -> Any:
            key = (count.__name__, str(network), about)
            if key not in counted:
                counted[key] = count(network, *about)
            return counted[key]

        return look

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "training_flops", once(planner.training_flops))
        patch.setattr(plan, "activation_bytes", once(plan.activation_bytes))
        yield


def config(url: str, storage: Path, *overrides: str) -> Config:
    settings: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "data": {"url": url, "global_batch_size": 16},
        "network": {"kind": "unet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1},
        "scaling": {"workers": 4},
        "duration": {"images": 64_000},
        "checkpoint": {"every_images": 3200, "snapshot_every_images": 6400},
    }
    return load_config(settings, overrides)


def by_topic(found: list[Finding]) -> dict[str, Finding]:
    assert len({one.topic for one in found}) == len(found)
    return {one.topic: one for one in found}


def test_a_good_config_has_no_problem(small_set: str, tmp_path: Path) -> None:
    found = by_topic(examine(config(small_set, tmp_path)))
    assert all(one.state == "good" for one in found.values()), found
    stages = found["memory"].facts["stages"]
    totals = {(one["stage"], one["offload"]): one["total"] for one in stages}
    assert totals[3, False] < totals[2, False] < totals[1, False] < totals[0, False]
    assert "zero_stage=0" in found["fit"].text
    assert "10 snapshots" in found["kept"].text
    assert found["kept"].facts["snapshot_bytes"] == 4 * found["memory"].facts["num_params"]


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("fp32", 2)])
def test_what_does_not_fit_is_a_problem_with_its_fix(
    small_set: str, tmp_path: Path, precision: str, stage: int
) -> None:
    parameters = by_topic(examine(config(small_set, tmp_path)))["memory"].facts["num_params"]
    tight = Machine(memory_bytes=int(parameters * 20))
    keys = ("engine.zero_stage=0", "engine.micro_batch_size=1", f"engine.precision={precision}")
    found = by_topic(examine(config(small_set, tmp_path, *keys), tight))
    assert found["fit"].state == "problem"
    assert f"set engine.zero_stage={stage}" in found["fit"].text
    found = by_topic(examine(config(small_set, tmp_path), Machine(memory_bytes=1000)))
    assert found["fit"].state == "problem"
    assert "engine.micro_batch_size (now 4)" in found["fit"].text


def test_what_is_missing_is_named(small_set: str, tmp_path: Path) -> None:
    found = by_topic(examine(config(str(tmp_path / "absent"), tmp_path)))
    assert found["data"].state == "problem"
    assert "--shape" in found["memory"].text
    found = by_topic(examine(config(str(tmp_path / "absent"), tmp_path), Machine(image_shape=(3, 16, 16))))
    assert found["memory"].state == "good"
    found = by_topic(examine(config(small_set, tmp_path, "network.kind=unet", "network.attention_resolutions=[5]")))
    assert "attention_resolutions" in found["network"].text


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_presets_fit_what_they_are_for(preset: str) -> None:
    shapes = {
        "demo.yaml": (1, 28, 28),
        "cifar10.yaml": (3, 32, 32),
        "latent-imagenet.yaml": (4, 32, 32),
        "text-to-image.yaml": (16, 64, 64),
        "shapes-latent.yaml": (4, 8, 8),
        "shapes-mmdit.yaml": (4, 8, 8),
    }
    shape = shapes.get(preset, (3, 64, 64))
    machine = Machine(memory_bytes=80 << 30, image_shape=shape)
    found = by_topic(examine(load_config(ROOT / "configs" / preset), machine))
    assert found["fit"].state == "good", found["fit"].text


def test_nodes_bring_a_partition_group() -> None:
    preset = load_config(ROOT / "configs" / "multinode.yaml")
    found = by_topic(examine(preset, Machine(int(2.8 * 2**30), 2, (3, 64, 64))))
    assert found["fit"].facts["partition_group"] == 8
    assert "engine.partition_group=8" in found["fit"].text
    with pytest.raises(UserError, match="--nodes 5"):
        examine(preset, Machine(1 << 30, 5, (3, 64, 64)))


def test_the_doctor_predicts_by_the_clusters_nodes_and_says_what_auto_takes() -> None:
    """Of the fewest and the most workers; a slower network makes every step longer, and nodes of four GPUs other
    groups."""

    def found(gbit_s: float, machine: Machine, *keys: str) -> dict[str, Finding]:
        keys = ("engine.zero_stage=auto", f"engine.internode_gbit_s={gbit_s}", "engine.micro_batch_size=64", *keys)
        return by_topic(examine(load_config(ROOT / "configs" / "multinode.yaml", keys), machine))

    machine = Machine(20 << 30, None, (3, 64, 64)).on_nodes([{"CPU": 8}, {"GPU": 4, "accelerator_type:A100": 1}])
    assert (machine.gpus_per_node, machine.gpu) == (4, "A100")
    fast, slow = found(400, machine), found(10, machine)
    times = {gbit: one["step time"].facts["predictions"] for gbit, one in ((400, fast), (10, slow))}
    assert {one["workers"] for one in times[400]} == {16, 32}
    assert {one["partition_group"] for one in times[400]} == {1, 4}
    assert all(a["exposed_s"] < b["exposed_s"] for a, b in zip(times[400], times[10], strict=True))
    assert "156 TFLOP/s" in fast["step time"].text
    assert fast["memory"].facts["nodes"] == 4
    assert fast["fit"].facts["auto"]["stage"] == 1  # within 5% of the quickest
    assert found(400, replace(machine, memory_bytes=80 << 30))["fit"].facts["auto"]["stage"] == 0
    once = found(10, machine, "engine.micro_batch_size=null")
    assert "auto takes ZeRO-3 in groups of 4: " in once["fit"].text
    assert "auto" not in found(400, machine, "engine.zero_stage=3")["fit"].facts


def test_sizes_and_shapes() -> None:
    assert parse_bytes("80G") == parse_bytes("80GiB") == 80 << 30
    assert parse_bytes("1.5M") == 3 << 19
    assert parse_shape("3x64x64") == (3, 64, 64)
    for text in ("80X", "-1G", ""):
        with pytest.raises(UserError, match="--memory"):
            parse_bytes(text)
    with pytest.raises(UserError, match="--shape"):
        parse_shape("3,64")
