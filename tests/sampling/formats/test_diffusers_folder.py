"""A folder that diffusers opens draws what our own sampling draws, under every kind of condition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import UserError
from scoreray.sampling.formats.diffusers_plain import scheduler_of
from scoreray.sampling.guidance.guidance import ClassifierFree
from scoreray.sampling.imports.import_diffusers import import_diffusers
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.config import load_config
from scoreray.trainer.config.condition_values import condition_of
from scoreray.trainer.diffusion.condition import ConditionSpec

DIT = {"kind": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "text_encoder": {"hidden_size": 8, "depth": 1}}
CONDITIONS = {
    "kind_of": ConditionSpec("class", classes=("circle", "square")),
    "caption": ConditionSpec("text", (12,)),
    "place": ConditionSpec("vector", (2,)),
    "coarse": ConditionSpec("concat", (1, 4, 4)),
    "track": ConditionSpec("sequence", (3, 2)),
}
GIVEN = {
    "kind_of": "square",
    "caption": "red",
    "place": [0.5, -1],
    "coarse": np.ones((4, 4)),
    "track": [[1, 2], [3, 4]],
}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies the code of folders that it loads."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def runs(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("runs")
    return {
        "unet": new_run(str(place / "unet")),
        "dit": new_run(str(place / "dit"), shape=(3, 8, 8), network=DIT, classes=0, conditions=CONDITIONS),
    }


def opened(folder: str, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_pipeline_and_our_sampling_agree_from_the_same_noise(
    runs: dict[str, str], kind: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "model")
    export_model(runs[kind], out, (), ExportOptions("diffusers"))
    ours, pipeline = load(runs[kind]), opened(out)
    values: dict[str, Any] = {"label": 2} if kind == "unet" else GIVEN
    noise = torch.randn(2, *ours.info.image_shape, generator=torch.Generator().manual_seed(1))
    row = condition_of(values, ours.info.conditions)
    assert row is not None
    for sampler, weight in (("heun", 1.0), ("dpmpp_2m", 2.0)):
        drawn = pipeline(
            2, condition=values, num_inference_steps=4, sampler=sampler, guidance_scale=weight, latents=noise,
            output_type="pt",
        ).images  # fmt: skip
        guided = ours if weight == 1 else ClassifierFree(ours, weight)
        sigmas = ours.info.sigmas(4)
        wanted = sample(guided, noise * sigmas[0], sigmas, sampler=sampler, condition=row.expand(2))
        assert (drawn - wanted).abs().max() < 1e-5
    words = {"label": "class-1"} if kind == "unet" else {"caption": "red"}
    (wanted, _), *_ = generate(ours, Request(count=2, steps=3, seed=4, conditions=words))
    drawn = pipeline(2, condition=words, num_inference_steps=3, seed=4, output_type="pt").images
    assert (drawn - wanted).abs().max() < 1e-5
    again = load(out)  # every verb takes the folder too
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    assert again.info.conditions == ours.info.conditions


def test_lengths_are_variants_and_outputs_are_pictures(runs: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    export_model(runs["unet"], out, (), ExportOptions("diffusers"))
    pipeline = opened(out, variant="ema-0_100")
    x = torch.randn(1, 1, 8, 8)
    found = pipeline.denoiser(x, 1.0)
    assert torch.allclose(found, load(runs["unet"], "0.1")(x, 1.0), atol=1e-6)
    assert not torch.allclose(found, load(out)(x, 1.0), atol=1e-3)
    drawn = pipeline(
        2, class_labels=["class-0", None], num_inference_steps=2, generator=torch.Generator().manual_seed(3)
    )
    assert [picture.size for picture in drawn.images] == [(8, 8), (8, 8)]
    array = pipeline(1, num_inference_steps=2, output_type="np", return_dict=False)[0]
    assert array.shape == (1, 8, 8, 1)
    assert array.min() >= 0
    assert array.max() <= 1
    pipeline.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "denoiser" / "config.json").read_text())
    assert saved["model"] == json.loads((Path(out) / "denoiser" / "config.json").read_text())["model"]
    for arguments, message in (
        ({"class_labels": [1]}, "1 class_labels for batch_size = 2"),
        ({"class_labels": 9}, "class label 9|9"),
        ({"condition": {"caption": "x"}}, "was not built for it"),
        ({"output_type": "jpg"}, "pil, np, pt"),
        ({"sampler": "heum"}, "did you mean 'heun'"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(2, **arguments)


def test_a_repository_of_the_hub_opens_by_its_name(runs: dict[str, str], hub: Any, tmp_path: Path) -> None:
    """diffusers downloads what its own rules of names say, not all files."""
    export_model(runs["unet"], "hf://me/digits", (), ExportOptions("diffusers"))
    options = {"cache_dir": tmp_path / "cache", "variant": "ema-0_100"}
    x = torch.randn(1, 1, 8, 8)
    found = opened("me/digits", **options).denoiser(x, 1.0)
    assert torch.allclose(found, load(runs["unet"], "0.1")(x, 1.0), atol=1e-6)


def test_an_export_replaces_the_weights_of_one_in_another_format(runs: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path)
    export_model(runs["unet"], out, (), ExportOptions("diffusers"))
    weights = {path.name for path in (tmp_path / "denoiser").glob("*.safetensors")}
    assert weights == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.ema-0_100.safetensors"}
    export_model(runs["unet"], out, ("0.1",))
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["ema-0.100.safetensors"]
    with pytest.raises(UserError, match="is the model itself"):
        export_model(out, out)
    copy = export_model(out, str(tmp_path / "copy"), (), ExportOptions("diffusers")).page
    assert list(copy.files) == ["0.100"]
    assert copy.checkpoint.startswith(runs["unet"])


def test_an_imported_model_goes_back_as_a_folder_of_diffusers_own(tmp_path: Path) -> None:
    """Its pipeline's class loads it, draws what the original draws, and a second import finds the same model."""
    from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    network = UNet2DModel(8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    DDIMPipeline(network, scheduler).save_pretrained(tmp_path / "theirs")
    imported = import_diffusers(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    out = str(tmp_path / "back")
    text = export_model(str(tmp_path / "ours"), out, (), ExportOptions("diffusers")).text()
    assert (
        f'next: from diffusers import DiffusionPipeline\n      pipeline = DiffusionPipeline.from_pretrained("{out}")'
        in text
    )
    assert f"imported from `{tmp_path / 'theirs'}`." in Path(out, "README.md").read_text()
    images = []
    for folder in (str(tmp_path / "theirs"), out):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert type(pipeline) is DDIMPipeline
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images.append(pipeline(2, generator, num_inference_steps=3, output_type="np").images)
    assert np.abs(images[0] - images[1]).max() < 1e-5
    again = import_diffusers(out, str(tmp_path / "again"))
    assert (again.noise, again.network) == (imported.noise, imported.network)
    first, second = (load(str(tmp_path / name)) for name in ("ours", "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(UserError, match="is the folder that it was imported from"):
        export_model(str(tmp_path / "ours"), str(tmp_path / "theirs"), (), ExportOptions("diffusers"))


@pytest.mark.parametrize(
    ("schedule", "denoiser", "process", "expected"),
    [
        ({"kind": "ddpm", "schedule": "scaled_linear"}, {"parameterization": "noise"}, {},
         ("DDIMScheduler", {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"})),
        ({"kind": "flow_matching"}, {"parameterization": "velocity"}, {"kind": "flow_matching", "shift": 3.0},
         ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})),
        ({"kind": "edm"}, {"parameterization": "edm", "sigma_data": 0.7}, {},
         ("EDMEulerScheduler", {"sigma_data": 0.7})),
        ({"kind": "ddpm"}, {"parameterization": "edm"}, {}, "no scheduler of diffusers takes it so"),
    ],
)  # fmt: skip
def test_the_scheduler_says_what_the_network_knows(schedule: Any, denoiser: Any, process: Any, expected: Any) -> None:
    network = {"kind": "diffusers", "class_name": "UNet2DModel", "config": {}, "schedule": schedule}
    config = load_config({
        "run": {"name": "r", "storage": "s"}, "data": {"url": "d"}, "duration": {"images": 1}, "network": network,
        "denoiser": {"sigma_data": 1.0, **denoiser}, **({"process": process} if process else {}),
    })  # fmt: skip
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            scheduler_of(config, config.network)
        return
    name, found = scheduler_of(config, config.network)
    assert name == expected[0]
    assert expected[1].items() <= found.items()
