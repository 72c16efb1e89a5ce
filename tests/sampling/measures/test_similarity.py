"""PSNR and SSIM against the formulas of Wang 2004, for pictures in [-1, 1]: a range L of 2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from scoreray.sampling.measures.similarity import image_similarity

C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2


def test_constant_pictures_differ_by_their_luminance_alone() -> None:
    """SSIM = (2 a b + C1) / (a^2 + b^2 + C1), as contrast and structure are C2 / C2."""
    for a, b in ((0.5, -0.2), (0.3, 0.4), (-1.0, 1.0), (0.0, 0.02)):
        psnr, ssim = image_similarity(*(torch.full((1, 3, 16, 16), value, dtype=torch.float64) for value in (a, b)))
        assert ssim.item() == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1), abs=1e-6)
        assert psnr.item() == pytest.approx(10 * math.log10(4 / (a - b) ** 2), abs=1e-4)


def test_ssim_is_the_mean_of_the_formula_over_gaussian_windows() -> None:
    images, originals = (
        torch.rand(2, 2, 1, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )

    def windowed(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, mode="mirror", radius=5)

    for x, y, found in zip(
        images.numpy()[:, 0], originals.numpy()[:, 0], image_similarity(images, originals)[1], strict=True
    ):
        mean_x, mean_y = windowed(x), windowed(y)
        var_x, var_y = windowed(x * x) - mean_x**2, windowed(y * y) - mean_y**2
        covariance = windowed(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
        assert found.item() == pytest.approx(
            float((luminance * (2 * covariance + C2) / (var_x + var_y + C2)).mean()), abs=1e-9
        )


@pytest.mark.parametrize("side", [1, 2, 5, 6, 16])
def test_a_picture_of_any_size_is_like_itself_and_less_like_another(side: int) -> None:
    x, y = torch.rand(2, 1, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert image_similarity(x, x)[1].item() == pytest.approx(1, abs=1e-6)
    assert image_similarity(x, y)[1].item() < 0.9
