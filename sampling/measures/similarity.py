"""How alike two pictures are: PSNR, and SSIM (Wang 2004), of batches in [-1, 1], by torchmetrics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

RANGE = 2.0  # from black to white
WINDOW = 11  # pixels that SSIM compares at once


def image_similarity(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """(PSNR in dB, SSIM) of each image of [B, C, H, W] in [-1, 1], float64 [B] on the CPU. SSIM's window is smaller
    (odd) for images that it would not fit into."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    side = min(images.shape[2:])
    window = min(WINDOW, side - 1 + side % 2)
    psnr = peak_signal_noise_ratio(images, originals, data_range=RANGE, reduction="none", dim=(1, 2, 3))
    ssim: Any = structural_similarity_index_measure(
        images, originals, data_range=RANGE, reduction="none", kernel_size=window
    )
    return psnr.double().cpu(), ssim.double().cpu().reshape(-1)
