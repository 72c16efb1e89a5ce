"""How alike two pictures are: PSNR, and SSIM (Wang 2004), of batches in [-1, 1], by torchmetrics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

RANGE = 2.0  # from black to white
SIGMA = 1.5  # pixels, of SSIM's Gaussian window, which goes 3.5 of it (rounded) to each side: 11 x 11 pixels


def image_similarity(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """(PSNR in dB, SSIM) of each image of [B, C, H, W] in [-1, 1], float64 [B] on the CPU. SSIM's window is narrower
    for images of fewer than 6 pixels, which it is mirrored at the edges of."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    sigma = min(SIGMA, (min(images.shape[2:]) - 0.51) / 3.5)  # mirroring needs more pixels than it adds
    psnr = peak_signal_noise_ratio(images, originals, data_range=RANGE, reduction="none", dim=(1, 2, 3))
    ssim: Any = structural_similarity_index_measure(images, originals, data_range=RANGE, reduction="none", sigma=sigma)
    return psnr.double().cpu(), ssim.double().cpu().reshape(-1)
