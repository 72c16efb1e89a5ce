"""Models that diffusers saved: the same noise through its scheduler or pipeline and through our samplers, batched too.

Networks are tiny and their weights random. Differences are in units of the samples' standard deviation.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.sampling.guidance.guidance import ClassifierFree
from scoreray.sampling.imports.import_diffusers import ImportOptions, import_diffusers
from scoreray.sampling.imports.scheduler import trained_noise
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.samplers.noise import SampleNoise, TorchNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.request import SampleRequest
from scoreray.trainer import loop
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.diffusion.process import DDPM, VE, FlowMatching
from scoreray.trainer.initial import begin
from scoreray.trainer.prepare import prepare_run

CLOSE = 1e-4
FLOW_START = 1e6  # sigma / alpha in the place of infinity, with which flow matching begins
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**{"sample_size": 8, "in_channels": 3, "out_channels": 3, **BLOCKS, **blocks, **settings})


def text_unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=12, **BLOCKS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )  # fmt: skip


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 2, "sample_size": 8}


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=5, **HEADS)


def pixart(takes_pixels: bool) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        in_channels=4, out_channels=8, caption_channels=12, cross_attention_dim=24,
        use_additional_conditions=takes_pixels, **HEADS | {"attention_head_dim": 12},
    )  # fmt: skip


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        in_channels=4, out_channels=4, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        pos_embed_max_size=8, **HEADS,
    )  # fmt: skip


def saved(tmp_path: Path, network: Any, scheduler: Any, component: str = "unet") -> str:
    """A pipeline's folder of a network, its weights random also where they begin as zeros, and a scheduler."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.eval().parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
    folder = tmp_path / "pipeline"
    network.save_pretrained(folder / component)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({component: ["diffusers", type(network).__name__]}))
    return str(folder)


def imported(tmp_path: Path, folder: str, **options: Any) -> LoadedDenoiser:
    import_diffusers(folder, str(tmp_path / "model"), ImportOptions(**options))
    return load(str(tmp_path / "model"), device="cpu")


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


def walked(scheduler: Any, network: Any, z: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    """Their loop: the network at each timestep, the scheduler's step."""
    x = z
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)))
        more = {} if generator is None else {"generator": generator}
        x = scheduler.step(output, t, x, **more, **options).prev_sample
    return x


def levels(denoiser: LoadedDenoiser, timesteps: Tensor) -> Tensor:
    """Our grid of their timesteps: step t is (t + 1) / num_steps, and all end at 0."""
    process = denoiser.info.config.process
    sigmas = process.noise_to_signal((timesteps.double() + 1) / process.num_steps)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def begun(z: Tensor, sigmas: Tensor) -> Tensor:
    """x at the first level for their start x_T = z: all of unit variance, where sigma z would be a little less."""
    return z * (1 + sigmas[0] ** 2).sqrt().float()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_of_any_betas_and_prediction(tmp_path: Path, schedule: str, prediction: str) -> None:
    """Their last step goes to alpha-bar 1 (set_alpha_to_one), which is our sigma 0."""
    from diffusers import DDIMScheduler

    settings = {} if schedule == "squaredcos_cap_v2" else {"beta_start": 1e-3, "beta_end": 0.01}
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False, **settings)
    network = unet()
    denoiser = imported(tmp_path, saved(tmp_path, network, scheduler))
    scheduler.set_timesteps(10)
    z, sigmas = noise(2, 3, 8, 8), levels(denoiser, scheduler.timesteps)
    with torch.no_grad():
        theirs = walked(scheduler, lambda x, t: network(x, t).sample, z)
    assert apart(sample(denoiser, begun(z, sigmas), sigmas, sampler="ddim"), theirs) < CLOSE


def test_ddpm_with_the_same_noise_in_every_step(tmp_path: Path) -> None:
    """Ancestral steps over a part of the ladder, each with the normal numbers of one generator."""
    from diffusers import DDPMScheduler

    network, scheduler = unet(), DDPMScheduler(clip_sample=False)
    denoiser = imported(tmp_path, saved(tmp_path, network, scheduler), timesteps="round")
    scheduler.set_timesteps(20)
    z, sigmas = noise(2, 3, 8, 8), levels(denoiser, scheduler.timesteps)
    with torch.no_grad():
        theirs = walked(scheduler, lambda x, t: network(x, t).sample, z, torch.Generator().manual_seed(2))
    same = TorchNoise(torch.Generator().manual_seed(2))
    assert apart(sample(denoiser, begun(z, sigmas), sigmas, sampler="ddpm", generator=same), theirs) < CLOSE


def test_classes_and_guidance_of_a_dit_whose_output_has_variances(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    network, scheduler = dit(), DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    denoiser = imported(tmp_path, saved(tmp_path, network, scheduler, "transformer"))
    assert denoiser.info.classes == ("0", "1", "2", "3", "4")
    scheduler.set_timesteps(10)
    labels, z, sigmas = torch.tensor([3, 0]), noise(2, 4, 8, 8), levels(denoiser, scheduler.timesteps)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([labels, torch.tensor([5, 5])])
        given, null = network(torch.cat([x, x]), torch.cat([t, t]), class_labels=both).sample[:, :4].chunk(2)
        return null + 3 * (given - null)

    with torch.no_grad():
        theirs = walked(scheduler, guided, z)
    ours = sample(ClassifierFree(denoiser, 3), begun(z, sigmas), sigmas, sampler="euler", condition=labels)
    assert apart(ours, theirs) < CLOSE


def test_stable_diffusions_pipeline_with_dpm_solver_and_guidance(tmp_path: Path) -> None:
    """DPM-Solver++(2M) whose last step, to sigma 0, is of first order (final_sigmas_type zero), as ours is."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    network = text_unet()
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012)
    folder = saved(tmp_path, network, scheduler)
    prompt, empty, z = noise(2, 5, 12), noise(1, 5, 12).flip(1), noise(2, 4, 8, 8)
    np.save(tmp_path / "empty.npy", empty[0])
    denoiser = imported(tmp_path, folder, length=5, nulls={"prompt": str(tmp_path / "empty.npy")})
    pipeline = StableDiffusionPipeline(None, None, None, network, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=empty.expand(2, -1, -1), latents=z, num_inference_steps=20,
        guidance_scale=4.0, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    given = Condition({"prompt": prompt}, {"prompt": torch.ones(2, 5, dtype=torch.bool)})
    sigmas = levels(denoiser, scheduler.timesteps)
    ours = sample(ClassifierFree(denoiser, 4.0), begun(z, sigmas), sigmas, sampler="dpmpp_2m", condition=given)
    assert apart(ours, theirs) < CLOSE


def test_pixarts_pipeline_with_masked_prompts_of_unlike_lengths(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    network, scheduler = pixart(False), DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
    folder = saved(tmp_path, network, scheduler, "transformer")
    prompt, empty, z = noise(2, 6, 12), noise(1, 6, 12).flip(1), noise(2, 4, 8, 8)
    mask, null_mask = torch.arange(6) < torch.tensor([[6], [3]]), (torch.arange(6) < 2).expand(2, 6)
    np.save(tmp_path / "empty.npy", empty[0, :2])
    denoiser = imported(tmp_path, folder, length=6, nulls={"prompt": str(tmp_path / "empty.npy")})
    pipeline = PixArtSigmaPipeline(None, None, None, network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=prompt, prompt_attention_mask=mask, negative_prompt=None, latents=z, num_inference_steps=16,
        negative_prompt_embeds=empty.expand(2, -1, -1), negative_prompt_attention_mask=null_mask, guidance_scale=4.0,
        height=64, width=64, use_resolution_binning=False, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    sigmas, given = levels(denoiser, scheduler.timesteps), Condition({"prompt": prompt}, {"prompt": mask})
    ours = sample(ClassifierFree(denoiser, 4.0), begun(z, sigmas), sigmas, sampler="dpmpp_2m", condition=given)
    assert apart(ours, theirs) < CLOSE


def test_pixart_is_given_the_size_in_pixels(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    network = pixart(True)
    denoiser = imported(tmp_path, saved(tmp_path, network, DDPMScheduler(), "transformer"), length=6, size=(8, 8))
    x, prompt, mask = noise(2, 4, 8, 8), noise(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)
    size = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    sigma = levels(denoiser, torch.tensor([400.0]))[0].float()
    with torch.no_grad():
        theirs = network(x, prompt, torch.tensor([400, 400]), size, encoder_attention_mask=mask).sample[:, :4]
        ours = denoiser.network(x, sigma.log().expand(2) / 4, Condition({"prompt": prompt}, {"prompt": mask}))
    assert apart(ours, theirs) < CLOSE


def test_stable_diffusion_3s_pipeline_with_shifted_flow_matching(tmp_path: Path) -> None:
    """Their first step is at t = 1, where our sigma is infinite: 1e6 is as near as float32 tells apart. Euler's steps
    in t are Euler's in sigma = t / (1 - t), as both are exact in the direction of the data."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    network, scheduler = sd3(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    folder = saved(tmp_path, network, scheduler, "transformer")
    denoiser = imported(tmp_path, folder, length=5)
    assert denoiser.info.config.process == FlowMatching(t_max=0.9999, shift=3.0)
    prompt, pooled, z = noise(2, 5, 12), noise(2, 6), noise(2, 4, 8, 8)
    pipeline = StableDiffusion3Pipeline(network, scheduler, None, None, None, None, None, None, None, None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=torch.zeros(2, 5, 12), pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=torch.zeros(2, 6), latents=z, num_inference_steps=10, guidance_scale=4.0,
        height=64, width=64, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    t = scheduler.sigmas.double()
    sigmas = t / (1 - t).clamp(min=1 / FLOW_START)
    given = Condition({"prompt": prompt, "pooled": pooled}, {"prompt": torch.ones(2, 5, dtype=torch.bool)})
    start = z * (1 + sigmas[0]).float()
    ours = sample(ClassifierFree(denoiser, 4.0), start, sigmas, sampler="euler", condition=given)
    assert apart(ours, theirs) < CLOSE


def test_in_one_batch_with_unlike_requests_each_gets_what_it_gets_alone(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    denoiser = imported(tmp_path, saved(tmp_path, text_unet(), DDIMScheduler()), length=5)
    sigmas = [denoiser.info.sigmas(steps).tolist() for steps in (4, 6)]
    given = [Condition({"prompt": noise(1, n, 12)}, {"prompt": torch.ones(1, n, dtype=torch.bool)}) for n in (5, 2)]
    requests = [
        SampleRequest([1], (4, 8, 8), sigmas[0], "heun", condition=given[0]),
        SampleRequest([2], (4, 8, 8), sigmas[1], "dpmpp_2m", condition=given[1], guidance=3.0),
        SampleRequest([3], (4, 8, 8), sigmas[1], "ddpm"),
    ]
    batcher = StepBatcher(denoiser, 8)
    tickets = [batcher.submit(one) for one in requests]
    while batcher.step():
        pass
    assert batcher.calls < 7 + 6 + 6
    for one, ticket in zip(requests, tickets, strict=True):
        source = SampleNoise(one.seeds)
        x = one.sigmas[0] * source.normal((1, *one.shape), torch.float32)
        alone = denoiser if one.guidance == 1 else ClassifierFree(denoiser, one.guidance)
        expected = sample(alone, x, one.sigmas, sampler=one.sampler, generator=source, condition=one.condition)
        assert apart(ticket.result(0), expected) < CLOSE


def test_other_classes_differ_in_names_only(tmp_path: Path) -> None:
    """Sana, whose t is times 1000, and AuraFlow, which takes t from 0 to 1: as their pipelines call them."""
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

    heads = {key: HEADS[key] for key in ("num_attention_heads", "attention_head_dim", "sample_size")}
    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=12, patch_size=1, **heads,
    )  # fmt: skip
    aura = AuraFlowTransformer2DModel(
        in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=12,
        caption_projection_dim=16, pos_embed_max_size=16, patch_size=2, **heads,
    )  # fmt: skip
    x, prompt, t = noise(2, 4, 8, 8), noise(2, 6, 12), torch.tensor([0.25, 0.7])
    given = Condition({"prompt": prompt}, {"prompt": torch.ones(2, 6, dtype=torch.bool)})
    sigma = t / (1 - t)
    for network, times in ((sana, 1000 * t), (aura, t)):
        folder = saved(tmp_path / type(network).__name__, network, FlowMatchEulerDiscreteScheduler(), "transformer")
        denoiser = imported(tmp_path / type(network).__name__, folder, length=6)
        with torch.no_grad():
            velocity = network(x, prompt, timestep=times).sample
            denoised = denoiser(x / (1 - t).view(2, 1, 1, 1), sigma, given)
        assert apart(denoised, x - t.view(2, 1, 1, 1) * velocity) < CLOSE


@pytest.mark.parametrize("make", [text_unet, partial(pixart, False)], ids=["masks", "idle squeeze"])
@pytest.mark.slow
def test_what_onnx_lacks_is_written_otherwise(tmp_path: Path, make: Any) -> None:
    """onnxruntime chooses between no booleans, and squeezes no axis that is longer than 1, which torch leaves alone."""
    from diffusers import DDPMScheduler

    network = make()
    denoiser = imported(tmp_path, saved(tmp_path, network, DDPMScheduler()), length=5)
    done = export_model(str(tmp_path / "model"), str(tmp_path / "graph"), [], ExportOptions("onnx"))
    assert done.graphs[0].difference < 1e-3 * denoiser.sigma_data


def test_sdxls_unet_is_given_pooled_text_and_sizes(tmp_path: Path) -> None:
    """Its time ids as StableDiffusionXLPipeline gives them by default: the picture's size, no crop, the same size."""
    from diffusers import EulerDiscreteScheduler

    network = text_unet(addition_embed_type="text_time", addition_time_embed_dim=4,
                        projection_class_embeddings_input_dim=6 + 6 * 4)  # fmt: skip
    denoiser = imported(tmp_path, saved(tmp_path, network, EulerDiscreteScheduler()), length=5)
    assert denoiser.info.conditions["pooled"].shape == (6,)
    x, prompt, pooled = noise(2, 4, 8, 8), noise(2, 5, 12), noise(2, 6)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, 6)
    given = Condition({"prompt": prompt, "pooled": pooled}, {"prompt": torch.ones(2, 5, dtype=torch.bool)})
    sigma = levels(denoiser, torch.tensor([400.0]))[0].float()
    with torch.no_grad():
        theirs = network(
            x, torch.tensor([400, 400]), prompt, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        )
        ours = denoiser.network(x, sigma.log().expand(2) / 4, given)
    assert apart(ours, theirs.sample) < CLOSE
    assert denoiser.info.config.objective.label_dropout > 0, "guided as its pipeline guides it, without a warning"


def test_a_score_of_exploding_variance_is_of_pictures_from_0_to_1(tmp_path: Path) -> None:
    """NCSN++'s network takes x = x_0 + sigma z and sigma itself and gives the score (Song 2021)."""
    from diffusers import ScoreSdeVeScheduler

    network = unet(time_embedding_type="fourier")
    folder = saved(tmp_path, network, ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=40.0))
    denoiser = imported(tmp_path, folder)
    assert denoiser.info.config.process == VE(0.02, 80.0)
    x, sigma = noise(3, 3, 8, 8), torch.tensor([0.05, 1.0, 20.0])
    with torch.no_grad():
        score = network(x, sigma).sample
        ours = denoiser(2 * x - 1, 2 * sigma)
    assert apart(ours, 2 * (x + sigma.view(3, 1, 1, 1) ** 2 * score) - 1) < CLOSE


def test_edms_scheduler_is_edms_own_preconditioning(tmp_path: Path) -> None:
    from diffusers import EDMEulerScheduler

    network, scheduler = unet(), EDMEulerScheduler()
    denoiser = imported(tmp_path, saved(tmp_path, network, scheduler))
    scheduler.set_timesteps(6)
    z = noise(2, 3, 8, 8)
    x = z * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    sigmas = scheduler.sigmas.double()
    assert apart(sample(denoiser, z * scheduler.init_noise_sigma, sigmas, sampler="euler"), x) < CLOSE


def test_betas_without_a_name_zero_terminal_snr_and_dynamic_shifts() -> None:
    def read(name: str, num_tokens: int = 0, **settings: Any) -> Any:
        return trained_noise({"_class_name": name, **settings}, num_tokens).process

    trained = read("DDIMScheduler", trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    assert trained.betas == pytest.approx([0.1, 0.2, 0.3], rel=1e-6)
    zero = read("DPMSolverMultistepScheduler", rescale_betas_zero_snr=True, beta_schedule="scaled_linear")
    assert float(zero.alpha(1.0)) ** 2 == pytest.approx(2.0**-24)
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    shifts = [read("FlowMatchEulerDiscreteScheduler", tokens, **dynamic).shift for tokens in (256, 4096)]
    assert shifts == pytest.approx([np.exp(0.5), np.exp(1.15)])
    assert read("UniPCMultistepScheduler", prediction_type="flow_prediction", flow_shift=3.0).shift == 3.0
    assert read("PNDMScheduler", beta_schedule="squaredcos_cap_v2") == DDPM(schedule="squared_cosine")


def test_noise_levels_between_steps_are_interpolated_or_rounded(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    folder = saved(tmp_path, unet(), DDPMScheduler())
    between = DDPM().noise_to_signal(torch.tensor([401.25, 0.2, 401.0], dtype=torch.float64) / 1000).log().float() / 4
    assert imported(tmp_path, folder).network.timestep(between).tolist() == pytest.approx([400.25, 0, 400], abs=1e-2)
    assert imported(tmp_path, folder, timesteps="round").network.timestep(between).tolist() == [400, 0, 400]


def test_a_class_that_means_none(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    network = unet(num_class_embeds=4)
    folder = saved(tmp_path, network, DDPMScheduler())
    x, sigma, none = noise(2, 3, 8, 8), torch.ones(2), torch.tensor([-1, 2])
    without = imported(tmp_path, folder)
    assert without.info.classes == ("0", "1", "2", "3")
    with pytest.raises(UserError, match="has no null class"):
        without(x, sigma, none)
    denoiser = imported(tmp_path, folder, null_class=3)
    assert denoiser.info.classes == ("0", "1", "2")
    assert torch.equal(denoiser(x, sigma, none), without(x, sigma, torch.tensor([3, 2])))
    with pytest.raises(UserError, match="--null-class 9: this UNet2DModel has the classes 0 to 3"):
        imported(tmp_path, folder, null_class=9)


def test_the_command_and_pictures_of_an_imported_model(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    folder = saved(tmp_path, unet(), DDPMScheduler())
    done = CliRunner().invoke(app, ["import", "diffusers", folder, str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert "UNet2DModel: samples [3, 8, 8], predicts noise" in done.output
    assert "left out: clip_sample" in done.output
    drawn = ["sample", str(tmp_path / "model"), "--count", "2", "--steps", "3", "--out", str(tmp_path / "pictures")]
    assert CliRunner().invoke(app, drawn).exit_code == 0
    assert len(list((tmp_path / "pictures").rglob("0*.png"))) == 2


SCHEDULER = "scheduler/scheduler_config.json"
IMAGE = {"_class_name": "UNet2DConditionModel", "sample_size": 8, "addition_embed_type": "image"}
ODD = {"_class_name": "UNet2DModel", "sample_size": 9}
SD3 = {"_class_name": "SD3Transformer2DModel", "sample_size": 8}
FOURIER = {"_class_name": "UNet2DModel", "sample_size": 8, "time_embedding_type": "fourier"}
FILES: dict[str, Any] = {
    "unet/config.json": {"_class_name": "UNet2DModel", "sample_size": 8},
    "unet/diffusion_pytorch_model.safetensors": b"",
    SCHEDULER: {"_class_name": "DDPMScheduler"},
    "model_index.json": {"unet": ["diffusers", "UNet2DModel"]},
}


def test_a_run_begins_from_an_imported_model(small_run: Any, small_set: str, tmp_path: Path) -> None:
    """Bit by bit what it gives; a class more is another table in diffusers' network, and refused."""
    from diffusers import DDPMScheduler

    net = unet(in_channels=1, out_channels=1, num_class_embeds=3)
    model = imported(tmp_path, saved(tmp_path, net, DDPMScheduler()))
    config, init = model.info.config.model_dump(mode="json"), {"checkpoint": str(tmp_path / "model")}
    settings = small_run("tuned", tmp_path, 16, **{key: config[key] for key in ("process", "network", "denoiser")})
    run = prepare_run(load_config({**settings, "init": init}))
    assert run.notes == (f"begins from {tmp_path / 'model'} at 0 images, without averaging",)
    module, engine = loop._build(run.config, run.fields, 1, torch.device("cpu"), lambda line: None)
    begin(run.config, run.fields, engine, module, 0, 1)
    x, sigma, labels = noise(3, 1, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(module.eval().denoiser(x, sigma, labels), model(x, sigma, labels))
    assert loop.train(run.config) == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unet/config.json": {"_class_name": "UNet2DMode"}}, "_class_name 'UNet2DMode': did you mean 'UNet2DModel'"),
        ({"unet/config.json": {"_class_name": "FluxTransformer2DModel"}}, "accepted: .*SD3Transformer2DModel"),
        ({"unet/diffusion_pytorch_model.safetensors": None}, "has config.json but no weights"),
        (
            {"unet/diffusion_pytorch_model.safetensors": None, "unet/diffusion_pytorch_model.bin": b"\x80"},
            "diffusion_pytorch_model.bin: is a pickle, which can run code .*docs/pretrained.md",
        ),
        ({"unet/config.json": None}, "has no unet/config.json"),
        ({"unet/config.json": None, "model_index.json": None}, "has neither model_index.json nor config.json"),
        ({SCHEDULER: None}, "has no scheduler_config.json.* --scheduler"),
        ({SCHEDULER: b"{"}, "can't be read as JSON"),
        ({SCHEDULER: {"_class_name": "KarrasVeScheduler"}}, "scheduler 'KarrasVeScheduler'"),
        ({SCHEDULER: {"_class_name": "ScoreSdeVeScheduler"}}, "time_embedding_type: positional.* go together"),
        ({"unet/config.json": SD3}, "'DDPMScheduler' with noise as prediction: a SD3.* is trained by flow"),
        ({"unet/config.json": ODD}, r"samples of \[3, 9, 9\]: UNet2DModel can't be called with them: .*--size"),
        ({SCHEDULER: {"_class_name": "DDPMScheduler", "prediction_type": "x"}}, "'x': accepted"),
        ({SCHEDULER: {"_class_name": "DDPMScheduler", "beta_schedule": "x"}}, "refuses it"),
        (
            {SCHEDULER: {"_class_name": "DDPMScheduler", "trained_betas": [0.1, -3]}},
            r"trained_betas must be num_train_timesteps numbers from 0 to 1: \[0.1, -3\]",
        ),
        ({SCHEDULER: {"_class_name": "DDPMScheduler", "num_train_timesteps": 10**9}}, "accepted: 1 to 100,000"),
        ({}, r"model.safetensors: is cut off or damaged \(SafetensorError: .*\); copy it again"),
        ({"unet/config.json": {"_class_name": "UNet2DModel"}}, "has no sample_size.*--size"),
        ({"unet/config.json": FOURIER}, "time_embedding_type: fourier"),
        ({"unet/config.json": IMAGE}, "addition_embed_type: image"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_one_line(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    for name, content in {**FILES, **changed}.items():
        if content is not None:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ScorerayError, match=message) as caught:
        import_diffusers(str(tmp_path), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_config_are_listed(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    folder = saved(tmp_path, unet(), DDPMScheduler())
    path = Path(folder) / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": 2}))
    with pytest.raises(DataError, match=r"missing: (\S+, ){10}\.\.\. \(\d+ in all\)"):
        import_diffusers(folder, str(tmp_path / "model"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": 1, "mid_block_type": None}))
    with pytest.raises(DataError, match="not of this network: mid_block"):
        import_diffusers(folder, str(tmp_path / "model"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [8, 32]}))
    with pytest.raises(DataError, match="of other shapes: down_blocks"):
        import_diffusers(folder, str(tmp_path / "model"))


def test_weights_that_are_not_finite_are_named_and_diffusers_logs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DDPMScheduler

    network = unet()
    folder = saved(tmp_path, network, DDPMScheduler())
    path = Path(folder) / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    imported(tmp_path, folder)
    assert capfd.readouterr() == ("", "")
    network.conv_in.bias.data[0] = np.nan
    with pytest.raises(DataError, match=r"unet: weights that are not finite: conv_in\.bias$"):
        import_diffusers(saved(tmp_path, network, DDPMScheduler()), str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nulls": {"prompts": "a.npy"}}, "--null prompts=a.npy: can't be read"),
        ({"nulls": {"pooled": "ok.npy"}}, "takes none of that name; accepted: prompt"),
        ({"nulls": {"prompt": "ok.npy"}}, r"an array of shape \[3\]; \[up to 77, 12\] is accepted"),
        ({"null_class": 1}, "--null-class 1: this UNet2DConditionModel has no classes"),
        ({"scheduler": "nowhere.json"}, "--scheduler nowhere.json: no such file"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMScheduler

    folder = saved(tmp_path, text_unet(), DDPMScheduler())
    monkeypatch.chdir(tmp_path)
    np.save("ok.npy", np.zeros(3))
    with pytest.raises(UserError, match=message):
        import_diffusers(folder, "out", ImportOptions(**options))
