"""Peers of `benchmarks/quality_lines.py` that are packages: diffusers, denoising-diffusion-pytorch, k-diffusion.

Widths are chosen so that a sample's forward pass takes about as many FLOPs as that of configs/demo.yaml's network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from quality_lines import CIFAR, Denoise, Ours, Peer, PlainEDM, Task
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad


class Discrete(Peer):
    """A peer whose network knows the times of a discrete VP process by its alphas_cumprod."""

    predicts_v = False

    def alphas_cumprod(self) -> Tensor:
        raise NotImplementedError

    def output(self, x: Tensor, time: Tensor) -> Tensor:
        raise NotImplementedError

    def denoise(self, x: Tensor, sigma: Tensor, condition: None = None) -> Tensor:
        """Clipped to the range of images, as the peers' own samplers clip it: without, they lose more."""
        alphas = self.alphas_cumprod().double()
        table = ((1 - alphas) / alphas).log() / 2
        level = sigma.double().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        time = above - 1 + (level - table[above - 1]) / (table[above] - table[above - 1])
        scale = (1 + sigma.float() ** 2).rsqrt().view(-1, 1, 1, 1)
        spread = sigma.float().view(-1, 1, 1, 1)
        out = self.output(x * scale, time.float())
        found = scale * (x * scale) - spread * scale * out if self.predicts_v else x - spread * out
        return found.clamp(-1, 1)


class Diffusers(Discrete):
    """diffusers' unconditional example: the options of its README, and its U-Net or one of our network's FLOPs."""

    batch_size, clip, warmup, rate = 16, 1.0, 500, 1e-4
    as_it_comes = False

    def build(self) -> None:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        channels, size, _ = self.task.shape
        self.margin = 0
        if self.as_it_comes:  # RGB, and six levels need a multiple of 32 pixels: a margin, which samples lose again
            self.margin = (32 - size) // 2
            shape: dict[str, Any] = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2}
            down = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
            up = ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4
            widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
        else:
            shape = {"sample_size": size, "in_channels": channels, "out_channels": channels, "layers_per_block": 1}
            shape["norm_num_groups"] = 16
            down, up = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
            widths = (16, 32, 32)
        self.model = UNet2DModel(**shape, block_out_channels=widths, down_block_types=down, up_block_types=up)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        parameters = self.model.parameters()
        self.ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.schedule = get_scheduler(
            "cosine",
            self.optimizer,
            num_warmup_steps=self.warmup,
            num_training_steps=self.task.total // self.batch_size,
        )
        self.noising = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def loss(self, batch: Tensor) -> Tensor:
        if self.as_it_comes:
            batch = pad(batch, [self.margin] * 4, value=-1.0).expand(-1, 3, -1, -1)
        noise, time = torch.randn_like(batch), torch.randint(0, 1000, (len(batch),))
        return mse_loss(self.model(self.noising.add_noise(batch, noise, time), time).sample, noise)

    def after_step(self) -> None:
        self.schedule.step()
        self.ema.step(self.model.parameters())

    def _keep(self, number: int) -> None:
        self.ema.copy_to(self.averaged.parameters())
        super()._keep(number)

    def alphas_cumprod(self) -> Tensor:
        alphas: Tensor = self.noising.alphas_cumprod
        return alphas

    def output(self, x: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.averaged(x, time).sample
        return found

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        return (3, 32, 32) if self.as_it_comes else self.task.shape

    def as_images(self, drawn: Tensor) -> Tensor:
        inner = slice(self.margin, drawn.shape[-1] - self.margin)
        drawn = drawn[..., inner, inner]
        return drawn.mean(1, keepdim=True) if self.task.shape[0] < drawn.shape[1] else drawn

    def own_samples(self, denoise: Denoise, count: int, seeds: list[int]) -> Tensor:
        from diffusers import DDPMPipeline

        pipeline = DDPMPipeline(unet=self.averaged, scheduler=self.noising)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(batch_size=count, generator=torch.Generator().manual_seed(0), output_type="np").images
        return torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1


class DiffusersAsItComes(Diffusers):
    as_it_comes = True


class DiffusersTuned(Diffusers):
    """The same at ten times its learning rate, which a short run wants, and a warm-up that fits it."""

    rate, warmup = 1e-3, 100


class DenoisingDiffusionPytorch(Discrete):
    """denoising-diffusion-pytorch with its README's Trainer: 32 images, gradients of two batches, Adam at 8e-5."""

    batch_size, accumulate, clip, rate, predicts_v = 32, 2, 1.0, 8e-5, True

    def build(self) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        channels, size, _ = self.task.shape
        unet = Unet(dim=8, dim_mults=(1, 2, 4), channels=channels)
        self.model = GaussianDiffusion(unet, image_size=size, timesteps=1000, sampling_timesteps=250)
        self.ema = EMA(self.model, beta=0.995, update_every=10)
        self.averaged = self.ema.ema_model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate, betas=(0.9, 0.99))

    def loss(self, batch: Tensor) -> Tensor:
        flipped = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
        found: Tensor = self.model(flipped / 2 + 0.5)
        return found

    def after_step(self) -> None:
        self.ema.update()

    def alphas_cumprod(self) -> Tensor:
        return self.averaged.alphas_cumprod

    def output(self, x: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.averaged.model(x, time)
        return found

    def own_samples(self, denoise: Denoise, count: int, seeds: list[int]) -> Tensor:
        torch.manual_seed(0)
        drawn: Tensor = self.averaged.sample(batch_size=count)
        return drawn * 2 - 1

    def network(self) -> nn.Module:
        return self.averaged.model


class KDiffusion(Peer):
    """k-diffusion's trainer with its config for MNIST or CIFAR-10, whose U-Net has fewer channels here."""

    batch_size = 64

    def build(self) -> None:
        import k_diffusion

        self.k = k_diffusion
        channels, size, _ = self.task.shape
        colour = channels == CIFAR
        model = {
            "type": "image_v1",
            "input_channels": channels,
            "input_size": [size, size],
            "patch_size": 1,
            "mapping_out": 256,
            "depths": [2, 4, 4],
            "channels": [16, 16, 32],
            "self_attn_depths": [False, colour, True],
            "loss_config": "karras",
            "loss_weighting": "soft-min-snr",
            "dropout_rate": 0.05,
            "augment_wrapper": True,
            "augment_prob": 0.12,
            "sigma_data": 0.5 if colour else 0.6162,
            "sigma_min": 1e-2,
            "sigma_max": 80,
            "sigma_sample_density": {"type": "cosine-interpolated"},
        }
        config = self.k.config.load_config({"model": model, "dataset": {}})
        inner = self.k.config.make_model(config)
        wrap = self.k.config.make_denoiser_wrapper(config)
        self.model, self.averaged = wrap(inner), wrap(copy.deepcopy(inner).requires_grad_(False))
        rate = 1e-4 if colour else 2e-4
        self.optimizer = torch.optim.AdamW(
            inner.param_groups(rate), lr=rate, betas=(0.95, 0.999), eps=1e-6, weight_decay=1e-3
        )
        self.decay = self.k.utils.EMAWarmup(power=0.6667, max_value=0.9999)
        self.levels = self.k.config.make_sample_density(config["model"])
        self.augment = self.k.augmentation.KarrasAugmentationPipeline(0.12)

    def batches(self) -> Iterator[Any]:
        from PIL import Image

        for batch in self.task.batches(self.batch_size):
            pixels = ((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
            drawn = [self.augment(Image.fromarray(one)) for one in pixels]
            yield torch.stack([one[0] for one in drawn]), torch.stack([one[2] for one in drawn])

    def loss(self, batch: Any) -> Tensor:
        images, applied = batch
        with self.k.utils.enable_stratified():
            sigma = self.levels([len(images)])
        losses: Tensor = self.model.loss(images, torch.randn_like(images), sigma, aug_cond=applied)
        return losses.mean()

    def after_step(self) -> None:
        with torch.no_grad():
            self.k.utils.ema_update(self.model, self.averaged, self.decay.get_value())
        self.decay.step()

    def denoise(self, x: Tensor, sigma: Tensor, condition: None = None) -> Tensor:
        found: Tensor = self.averaged(x, sigma.float())
        return found

    def own_samples(self, denoise: Denoise, count: int, seeds: list[int]) -> Tensor:
        torch.manual_seed(0)
        levels = self.k.sampling.get_sigmas_karras(50, 1e-2, 80, rho=7.0)
        x = torch.randn(count, *self.task.shape) * 80
        drawn: Tensor = self.k.sampling.sample_dpmpp_2m_sde(
            self.averaged, x, levels, eta=0.0, solver_type="heun", disable=True
        )
        return drawn

    def network(self) -> nn.Module:
        return self.averaged.inner_model


LINES: dict[str, Callable[[Task], Ours | Peer]] = {
    "diffusers as it comes": DiffusersAsItComes,
    "diffusers": Diffusers,
    "diffusers, lr 1e-3": DiffusersTuned,
    "plain EDM": PlainEDM,
    "denoising-diffusion-pytorch": DenoisingDiffusionPytorch,
    "k-diffusion": KDiffusion,
    "ours": Ours,
    "ours, fp32": lambda task: Ours(task, precision="fp32"),
}


def line_of(name: str, task: Task) -> Ours | Peer:
    """The line of a name, or `NAME=CONFIG.yaml` for a run of ours with another config."""
    title, _, config = name.partition("=")
    return Ours(task, config) if config else LINES[title](task)
