"""`data inspect --config`: for data of any kind and shape a config that loads, and a module that makes a step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import CHUNK, record_dtype
from scoreray.data.presets import PRESETS
from scoreray.data.reading.manifest import Index, Manifest, Shard
from scoreray.data.yaml_text import parse_yaml
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.from_data import suggested_config
from scoreray.trainer.config.network_for_data import Hardware
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.optim.muon import is_matrix_of_block
from scoreray.trainer.step import build_training_module

LAPTOP, SERVER = Hardware(cores=2), Hardware(cores=64, num_gpus=8, has_bf16=True)


def numbers(name: str, kind: Any, shape: Sequence[int], dtype: Any = "float32", scale: float = 1.0) -> Field:
    """A field whose channels have mean `scale` and this standard deviation."""
    channels = shape[-1 if kind == "sequence" else 0] if shape else 1
    spread = {"mean": [scale] * channels, "std": [scale] * channels, "low": [-3 * scale] * channels}
    logs = {"log_mean": [0.5] * channels, "log_std": [0.5] * channels}
    return Field(name, kind, list(shape), dtype, f"{name}.npy", high=[3 * scale] * channels, **spread, **logs)


def image(size: int = 16) -> Field:
    return Field(
        "image",
        "image",
        [3, size, size],
        "uint8",
        "png",
        mean=[127.0] * 3,
        std=[64.0] * 3,
        low=[0.0] * 3,
        high=[255.0] * 3,
    )


def data_set(*fields: Field, num_samples: int = 1000) -> Manifest:
    shard = Shard("shards/000000.tar", num_samples, 1 << 20, "0" * 64, "0" * 64)
    index = num_samples * record_dtype(list(fields)).itemsize + -(-num_samples // CHUNK) * 32
    about = Index("index.bin", index, "0" * 64)
    return Manifest(
        version=3, name="my set!", num_samples=num_samples, fields=list(fields), index=about, shards=[shard]
    )


def stored(target: Field, count: int) -> torch.Tensor:
    """Samples as a stream gives them."""
    if target.kind == "image":
        return torch.randint(0, 256, (count, *target.shape), dtype=torch.uint8)
    values = torch.randn(count, *(target.shape or [1])).mul(target.std[0]).add(target.mean[0])
    return values.to(getattr(torch, target.dtype))


def suggested(data: Manifest, machine: Hardware, tmp_path: Path) -> tuple[str, Config]:
    text = suggested_config(str(tmp_path / "set"), data, stored(data.target, 8), machine)
    (tmp_path / "mine.yaml").write_text(text)
    return text, load_config(tmp_path / "mine.yaml")


CLASSES = Field("label", "class", [], "int64", "cls", classes=["a", "b"], class_counts=[500, 500])
SETS = {
    "images": (image(), CLASSES),
    "latents": (numbers("latent", "array", [4, 32, 32], "float16", 0.9), CLASSES),
    "audio": (numbers("wave", "array", [1, 4096], "int16", 8000.0),),
    "volume": (numbers("scan", "array", [1, 24, 24, 24], "float32", 400.0),),
    "points": (numbers("array", "array", [2]),),
    "prices": (numbers("price", "scalar", []),),
}


@pytest.mark.parametrize("kind", list(SETS))
def test_a_step_can_be_made_of_the_config_of_any_data(kind: str, tmp_path: Path) -> None:
    data = data_set(*SETS[kind])
    _, config = suggested(data, LAPTOP, tmp_path)
    found = run_fields(config.data, data)
    assert found.sigma_data == pytest.approx(0.5, rel=0.1 if kind != "images" else 0.2)
    assert config.process.sigma_range()[1] >= 20 * found.sigma_data
    module = build_training_module(config, found)
    samples, rows = stored(data.target, 2), torch.arange(2)
    loss, _ = module(samples, Condition({"label": rows % 2}) if found.conditions else None, rows)
    loss.mean().backward()
    assert torch.isfinite(loss).all()
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in module.parameters())


@pytest.mark.parametrize("kind", list(SETS))
def test_a_machine_with_gpus_gets_a_larger_network_that_takes_the_data_too(kind: str, tmp_path: Path) -> None:
    _, small = suggested(data_set(*SETS[kind]), LAPTOP, tmp_path)
    _, large = suggested(data_set(*SETS[kind]), SERVER, tmp_path)
    assert (large.scaling.use_gpu, large.scaling.workers, large.engine.precision) == (True, 8, "bf16")
    assert (small.scaling.use_gpu, small.scaling.workers, small.engine.precision) == (False, 2, "fp32")
    assert large.duration.images > small.duration.images
    with torch.device("meta"):
        large.network.build(run_fields(large.data, data_set(*SETS[kind])).shape, 0)


def test_a_small_u_net_gets_the_demos_optimizer_and_others_adamw(tmp_path: Path) -> None:
    demo = load_config(PRESETS / "demo.yaml")
    assert demo.optimizer.kind == "muon"
    for kind in SETS:
        text, config = suggested(data_set(*SETS[kind]), LAPTOP, tmp_path)
        assert suggested(data_set(*SETS[kind]), SERVER, tmp_path)[1].optimizer.kind == "adamw", kind
        assert ("docs/networks.md" in text) == (config.network.kind == "unet"), kind
        found = config.optimizer
        assert found.warmup_images == config.duration.images // 20  # type: ignore[operator]
        if config.network.kind != "unet":
            assert found.kind == "adamw", kind
            continue
        assert replace(found, warmup_images=demo.optimizer.warmup_images) == demo.optimizer, kind
        module = build_training_module(config, run_fields(config.data, data_set(*SETS[kind])))
        assert any(is_matrix_of_block(name, one.shape) for name, one in module.named_parameters()), kind


def test_every_other_field_conditions_the_network_or_the_reason_is_given(tmp_path: Path) -> None:
    data = data_set(
        image(), CLASSES,
        Field("caption", "text", [700], "uint8", "txt"),
        numbers("t5", "sequence", [77, 16]),
        numbers("place", "vector", [2], "float64", 50.0),
        numbers("coarse", "array", [5, 4, 4], "float32", 280.0),
        Field("still", "scalar", [], "float32", "json", mean=[3.0], std=[0.0], low=[3.0], high=[3.0]),
        Field("silent", "text", [1], "uint8", "txt"),
        Field("notes", "json", [900], "uint8", "json"),
        numbers("wave", "array", [1, 2, 3, 4]),
    )  # fmt: skip
    text, config = suggested(data, LAPTOP, tmp_path)
    found = run_fields(config.data, data)
    assert {name: one.kind for name, one in found.conditions.items()} == {
        "label": "class", "caption": "text", "t5": "sequence", "place": "vector", "coarse": "concat",
    }  # fmt: skip
    assert config.data.conditions is not None
    assert (config.data.conditions["caption"].max_length, config.data.conditions["caption"].too_long) == (256, "cut")
    assert config.data.conditions["place"].normalisation == "channel"
    assert "# still: left out of the conditions: is the same in all samples, 3\n" in text
    assert "# silent: left out of the conditions: its texts are empty, or a single byte\n" in text
    assert "# notes: left out of the conditions: is kept with the samples, and not read (json)" in text
    assert "# wave: left out of the conditions: data.conditions.wave: field 'wave' is of kind array" in text
    assert config.objective.label_dropout == 0.1  # type: ignore[union-attr]


def test_data_with_a_long_tail_are_taken_by_their_logarithm_and_a_constant_channel_as_it_is(tmp_path: Path) -> None:
    rain = Field(
        "rain", "array", [1, 16, 16], "float32", "npy", mean=[0.1], std=[1.0], low=[0.0], high=[90.0], log_mean=[0.05],
        log_std=[0.3],
    )  # fmt: skip
    text, config = suggested(data_set(rain), LAPTOP, tmp_path)
    assert config.data.normalisation == "log1p"
    assert "the largest value is 90 standard deviations from the mean" in text
    constant = Field(
        "x", "array", [2, 8, 8], "float32", "npy", mean=[0.0, 1.0], std=[1.0, 0.0], low=[-1.0, 1.0], high=[1.0, 1.0]
    )
    assert suggested(data_set(constant), LAPTOP, tmp_path)[1].data.normalisation == "none"


def test_the_text_says_why_and_names_what_it_is_for(tmp_path: Path) -> None:
    text, config = suggested(data_set(*SETS["latents"]), LAPTOP, tmp_path)
    assert config.run.name == "my-set"
    assert config.run.storage == str(tmp_path / "runs")
    assert text.startswith(
        f"# Made by: scoreray data inspect {tmp_path}/set --config\n# For 1,000 samples of 4 x 32 x 32"
    )
    assert "no GPU was found" in text
    assert "# 4 channels of like spread about 0 are taken for an autoencoder's latents" in text
    assert "(Peebles & Xie 2023). If that is wrong, kind: unet may be the better start" in text
    assert "# Saved as my-set.yaml, or under another name, it is run by: scoreray train my-set.yaml" in text
    assert parse_yaml(text, "mine.yaml")["data"]["normalisation"] == "channel"


def test_fields_in_units_of_their_own_are_not_taken_for_latents(tmp_path: Path) -> None:
    weather = Field(
        "weather", "array", [4, 32, 64], "float32", "npy", mean=[280.0, 101_325.0, 1.0, -2.0],
        std=[9.0, 800.0, 5.0, 5.0],
    )  # fmt: skip
    assert suggested(data_set(weather), LAPTOP, tmp_path)[1].network.kind == "unet"
    text, _ = suggested(data_set(weather, numbers("hour", "scalar", []), numbers("x", "vector", [3])), LAPTOP, tmp_path)
    assert "# hour: a number; mean 1 and standard deviation 1 become 0 and 1" in text
    assert "# x: 3 numbers; means 1 to 1" in text


def test_data_without_anything_to_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises((UserError, ValueError), match="image"):
        suggested_config(str(tmp_path), data_set(CLASSES), torch.zeros(1), LAPTOP)
