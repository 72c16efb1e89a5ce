"""What others write, plainly, to be compared with: the DiT of Peebles and Xie 2023, and a loop of bare DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MetaBlock(nn.Module):
    """A DiT block with adaLN-zero as in the paper: LayerNorm without parameters, fused attention, GELU (tanh)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        batch, tokens, width = h.shape
        q, k, v = self.qkv(h).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1[:, None] * self.out(h)
        h = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.mlp(h)


class MetaDiT(nn.Module):
    """network(x, c_noise, class_labels) with the paper's parts, of the size that a `DiTConfig` says."""

    def __init__(self, config: Any, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, _ = image_shape
        self.patch, self.channels, width = config.patch_size, channels, config.hidden_size
        self.patch_in = nn.Conv2d(channels, width, self.patch, stride=self.patch)
        self.positions = nn.Parameter(torch.randn(1, (height // self.patch) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(MetaBlock(width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.patch_out = nn.Linear(width, self.patch**2 * channels)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        dtype = self.positions.dtype
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        phases = c_noise[:, None].float() * 1000 * frequencies
        c = self.time(torch.cat([phases.cos(), phases.sin()], dim=1).to(dtype)) + self.classes(class_labels + 1)
        h = self.patch_in(x.to(dtype))
        batch, _, rows, columns = h.shape
        h = h.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        h = self.patch_out(self.norm(h) * (1 + scale[:, None]) + shift[:, None])
        h = h.reshape(batch, rows, columns, self.patch, self.patch, self.channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape).to(x.dtype)


def bare_deepspeed(
    network: nn.Module,
    stage: int,
    half: bool,
    batch: int,
    world: int,
    clip: float,
    *,
    adam: str = "torch",
    fp32_sums: bool = False,
) -> Any:
    """DeepSpeed around a network and torch's AdamW (or its own for CPUs), as its documentation has it: no EMA.

    Its default sums gradients in the weights' precision; `fp32_sums`: in fp32, as our engines do.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as ours: a compiler would run at start
    settings = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // world,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": half},
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if fp32_sums and half:
        settings |= {"communication_data_type": "fp32"}
        settings |= {"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    if adam == "deepspeed":  # compiled at its first use, by g++ and ninja
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(network.parameters(), lr=1e-4)
    return deepspeed.initialize(model=network, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def diffusers_loop(flops: float, images: Tensor, world: int) -> Any:
    """A step of diffusers' unconditional example at its defaults: fp32, torch's unfused AdamW, no EMA.

    The U-Net's width is chosen so that an image costs about `flops` forward and backward.
    """
    import torch.distributed as dist
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler

    def unet(width: int) -> Any:
        return UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            norm_num_groups=4,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    costs = {width: _unet_flops(unet(width)) for width in range(8, 129, 4)}
    width = min(costs, key=lambda w: abs(math.log(costs[w] / flops)))
    torch.manual_seed(0)
    model = unet(width)
    if dist.get_rank() == 0:
        print(f"diffusers' U-Net: width {width}, {costs[width] / flops:.2f} of our FLOPs", flush=True)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)

    def step(k: int) -> None:
        clean = images.float() / 127.5 - 1
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),))
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        F.mse_loss(wrapped(noisy, timesteps).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def _unet_flops(model: Any) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    meta = model.to("meta")
    with FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, 1, 28, 28, device="meta"), torch.zeros(1, device="meta")).sample.sum().backward()
    return counter.get_total_flops()
