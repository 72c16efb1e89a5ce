"""Inception-v3 as FID knows it: TensorFlow's graph of 2015, its padding and pooling included.

Layers are named as in the files that torch-fidelity, torchmetrics and pytorch-fid load (`...-2015-12-05-6726825d.pth`).
Szegedy 2015; Heusel 2017 made it the extractor of FID.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

SIZE = 299
SHA256_START = "6726825d"  # of both published files: their names carry it
NUM_LOGITS = 1008
NUM_FEATURES = 2048

# A convolution: (layer's name, channels out, kernel, padding, stride). A branch goes through its convolutions one after
# another; two in a tuple run side by side and are concatenated. "avg", "max", "max/2" pool 3 x 3, the last at stride 2.
Conv = tuple[str, int, Any, Any, int]


def _c(name: str, out: int, kernel: Any = 1, padding: Any = 0, stride: int = 1) -> Conv:
    return (name, out, kernel, padding, stride)


def _a(pool: int) -> list[list[Any]]:
    return [
        [_c("branch1x1", 64)],
        [_c("branch5x5_1", 48), _c("branch5x5_2", 64, 5, 2)],
        [_c("branch3x3dbl_1", 64), _c("branch3x3dbl_2", 96, 3, 1), _c("branch3x3dbl_3", 96, 3, 1)],
        ["avg", _c("branch_pool", pool)],
    ]


def _b() -> list[list[Any]]:
    return [
        [_c("branch3x3", 384, 3, 0, 2)],
        [_c("branch3x3dbl_1", 64), _c("branch3x3dbl_2", 96, 3, 1), _c("branch3x3dbl_3", 96, 3, 0, 2)],
        ["max/2"],
    ]


def _c7(c: int) -> list[list[Any]]:
    row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
    return [
        [_c("branch1x1", 192)],
        [_c("branch7x7_1", c), _c("branch7x7_2", c, *row), _c("branch7x7_3", 192, *column)],
        [_c("branch7x7dbl_1", c), _c("branch7x7dbl_2", c, *column), _c("branch7x7dbl_3", c, *row),
         _c("branch7x7dbl_4", c, *column), _c("branch7x7dbl_5", 192, *row)],
        ["avg", _c("branch_pool", 192)],
    ]  # fmt: skip


def _d() -> list[list[Any]]:
    return [
        [_c("branch3x3_1", 192), _c("branch3x3_2", 320, 3, 0, 2)],
        [_c("branch7x7x3_1", 192), _c("branch7x7x3_2", 192, (1, 7), (0, 3)), _c("branch7x7x3_3", 192, (7, 1), (3, 0)),
         _c("branch7x7x3_4", 192, 3, 0, 2)],
        ["max/2"],
    ]  # fmt: skip


def _e(pool: str) -> list[list[Any]]:
    def split(name: str) -> tuple[Conv, Conv]:
        return _c(f"{name}a", 384, (1, 3), (0, 1)), _c(f"{name}b", 384, (3, 1), (1, 0))

    return [
        [_c("branch1x1", 320)],
        [_c("branch3x3_1", 384), split("branch3x3_2")],
        [_c("branch3x3dbl_1", 448), _c("branch3x3dbl_2", 384, 3, 1), split("branch3x3dbl_3")],
        [pool, _c("branch_pool", 192)],
    ]


BLOCKS: dict[str, list[list[Any]]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c7(128),
    "Mixed_6c": _c7(160),
    "Mixed_6d": _c7(160),
    "Mixed_6e": _c7(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e("avg"),
    "Mixed_7c": _e("max"),  # a quirk of the original graph
}
POOLS = {
    "avg": lambda x: avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # TensorFlow's leaves the padding out of the mean
    "max": lambda x: max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: max_pool2d(x, 3, 2),
}


class InceptionV3(nn.Module):
    """images uint8 [B, 1 or 3, H, W] -> (features [B, 2048], logits without bias [B, 1008]), float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Layer(3, 32, 3, 0, 2)
        self.Conv2d_2a_3x3 = _Layer(32, 32, 3)
        self.Conv2d_2b_3x3 = _Layer(32, 64, 3, 1)
        self.Conv2d_3b_1x1 = _Layer(64, 80, 1)
        self.Conv2d_4a_3x3 = _Layer(80, 192, 3)
        channels = 192
        for name, branches in BLOCKS.items():
            block = _Block(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(NUM_FEATURES, NUM_LOGITS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        x = (resize(images.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize(images: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear as TensorFlow 1 does it, images [B, C, H, W] -> [B, C, size, size]: pixel i is at i, not i + 1/2."""
    for dim in (3, 2):
        places = torch.arange(size, device=images.device) * (images.shape[dim] / size)
        low = places.long()
        high = (low + 1).clamp_max(images.shape[dim] - 1)
        share = (places - low).to(images.dtype).view(-1, *[1] * (3 - dim))
        left, right = images.index_select(dim, low), images.index_select(dim, high)
        images = left + (right - left) * share
    return images


class _Layer(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Any, padding: Any = 0, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


class _Block(nn.Module):
    """Branches side by side, concatenated."""

    def __init__(self, channels: int, branches: list[list[Any]]) -> None:
        super().__init__()
        self._branches, self.channels = branches, 0
        for branch in branches:
            width = channels
            for part in branch:
                sides = [] if isinstance(part, str) else [part] if isinstance(part[0], str) else list(part)
                for name, out, kernel, padding, stride in sides:
                    self.add_module(name, _Layer(width, out, kernel, padding, stride))
                width = sum(side[1] for side in sides) or width
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._through(branch, x) for branch in self._branches], 1)

    def _through(self, branch: list[Any], x: Tensor) -> Tensor:
        for part in branch:
            if isinstance(part, str):
                x = POOLS[part](x)
            elif isinstance(part[0], str):
                x = self.get_submodule(part[0])(x)
            else:
                x = torch.cat([self.get_submodule(side[0])(x) for side in part], 1)
        return x
