"""Linear operators A of a measurement y = A x0 + noise, and how a request names them.

A new one is one function that makes an `Operator`, and one line of OPERATORS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.data.errors import UserError, shortened
from scoreray.data.units import whole_number
from scoreray.sampling.guidance.observations import read_mask, read_numbers

BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, what Pillow and paint programs take


@dataclass(frozen=True)
class Operator:
    """A linear map A of one sample, batched: `apply` takes x [B, ...] to y, `transpose` y back to x.

    `solve(residual, prior [B], noise)` is (prior A A^T + noise I)^-1 residual; it must have a meaning at noise 0.
    """

    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor, Tensor, float], Tensor]


def mask(known: Tensor) -> Operator:
    """Inpainting: A keeps what `known` (bool, of a sample's shape, or [B, ...]) marks."""
    if known.dtype != torch.bool:
        raise UserError(f"a mask of {known.dtype}: must be bool, true where the sample is known")
    return Operator(lambda x: x * known.to(x.device), lambda y: y * known.to(y.device), _even(1.0))


def average_pool(factor: int) -> Operator:
    """Super-resolution by `factor`: A is the mean over factor x factor blocks of an image [B, C, H, W]."""

    def spread(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2) / factor**2

    return Operator(lambda x: torch.nn.functional.avg_pool2d(x, factor), spread, _even(1 / factor**2))


def gray() -> Operator:
    """Colourisation: A is the brightness of a colour image [B, 3, H, W], as pictures are made grey everywhere."""

    def weights(like: Tensor) -> Tensor:
        return torch.tensor(BRIGHTNESS, dtype=like.dtype, device=like.device).view(3, 1, 1)

    gram = math.fsum(weight**2 for weight in BRIGHTNESS)
    return Operator(lambda x: (x * weights(x)).sum(1, keepdim=True), lambda y: y * weights(y), _even(gram))


def matrix(a: Tensor) -> Operator:
    """Any A [m, d] of full row rank on flat samples [B, d]."""
    values, vectors = torch.linalg.eigh((a @ a.T).double())
    if values[0] <= 1e-12 * values[-1]:
        raise UserError(
            f"a matrix {list(a.shape)} whose rows depend on each other: leave out the ones that add nothing"
        )

    def solve(residual: Tensor, prior: Tensor, noise: float) -> Tensor:
        basis = vectors.to(residual)
        scaled = (residual @ basis) / (prior[:, None] * values.to(residual) + noise)
        return scaled @ basis.T

    return Operator(lambda x: x @ a.T.to(x), lambda y: y @ a.to(y), solve)


def _even(gram: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    """`solve` of an operator whose A A^T is `gram` times the identity."""
    return lambda residual, prior, noise: residual / (prior * gram + noise).view(-1, *[1] * (residual.ndim - 1))


Shape = tuple[int, ...]
Device = torch.device | str


def _inpaint(mask_url: str, shape: Shape, device: Device) -> Operator:
    return mask(read_mask(mask_url, shape).to(device))


def _superresolution(text: str, shape: Shape, _: Device) -> Operator:
    factor = whole_number(text) or 0
    if factor < 2 or shape[1] % factor or shape[2] % factor:
        raise UserError(
            f"superresolution={shortened(text)}: the factor must be 2 or more and divide {shape[1]} x {shape[2]}"
        )
    return average_pool(factor)


def _gray(_: str, shape: Shape, __: Device) -> Operator:
    if shape[0] != 3:
        raise UserError(f"gray: of images with red, green and blue, and this model's have {shape[0]} channel(s)")
    return gray()


def _matrix(url: str, shape: Shape, device: Device) -> Operator:
    size, rows = math.prod(shape), read_numbers(url)
    if rows.ndim != 2 or rows.shape[1] != size or rows.shape[0] > size:
        raise UserError(f"{url}: is {list(rows.shape)}, and this model needs [m, {size}], m at most {size}")
    flat = matrix(rows.to(device))
    return Operator(lambda x: flat.apply(x.flatten(1)), lambda y: flat.transpose(y).view(-1, *shape), flat.solve)


@dataclass(frozen=True)
class NamedOperator:
    """How a request writes an operator, and what makes it of the value that it writes and a sample's shape."""

    usage: str
    make: Callable[[str, Shape, Device], Operator]
    of_images: bool = True

    @property
    def takes_value(self) -> bool:
        return "=" in self.usage


OPERATORS: dict[str, NamedOperator] = {
    "inpaint": NamedOperator("inpaint", _inpaint),  # its value, the mask, is an option of its own
    "superresolution": NamedOperator("superresolution=FACTOR, such as superresolution=4", _superresolution),
    "gray": NamedOperator("gray", _gray),
    "matrix": NamedOperator("matrix=FILE, an npy [m, d]", _matrix, of_images=False),
}
"""Every operator, by the word that chooses it on the command line and in a request."""


def make_operator(name: str, value: str, shape: Shape, device: Device = "cpu") -> Operator:
    """The operator of a word of OPERATORS for samples of a shape. Raises UserError where it does not fit them."""
    named = OPERATORS[name]
    if named.of_images and len(shape) != 3:
        raise UserError(f"'{name}' is for images, and this model draws samples of shape {list(shape)}; use matrix=FILE")
    return named.make(value, shape, device)


def restoration_task(text: str, shape: Shape) -> Operator:
    """What an evaluation takes as known of an image: an operator, or "inpaint", all but the middle half each way.

    Raises UserError (`--restoration`).
    """
    name, _, value = text.partition("=")
    if name == "inpaint" and not value and len(shape) == 3:
        _, height, width = shape
        known = torch.ones(shape, dtype=torch.bool)
        known[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = False
        return mask(known)
    accepted = [one for one, named in OPERATORS.items() if named.of_images]
    if name not in accepted or OPERATORS[name].takes_value != bool(value):
        usages = "; ".join([*(OPERATORS[one].usage for one in accepted), "reconstruction"])
        raise UserError(f"--restoration {shortened(text)}: accepted: {usages}")
    try:
        return make_operator(name, value, shape)
    except UserError as error:
        raise UserError(f"--restoration {error}") from None
