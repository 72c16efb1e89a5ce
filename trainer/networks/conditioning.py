"""How noise level and conditions enter a network: as one embedding, as tokens, as further input channels.

kind      enters by
class     a learned vector a class, added to the noise level's embedding
vector    a perceptron's output, added to the embedding
sequence  tokens that blocks attend to (cross-attention); their mean, through a layer, is added to the embedding
text      the same, of what a small transformer makes of the text's bytes
level     a perceptron's output of its sines and cosines, added to the embedding; 0 at the start and without a value
concat    its grid, resized to the sample's, joined to the input channels with one that says where there is a grid

Each has a learned null, which rows without the condition get: a class of its own, a vector, a token (which rows with
tokens may attend to as well) and a vector, a channel of zeros. So classifier-free guidance has an unconditional
network inside the conditional one. At the start all nulls but that of a class are 0 and change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.own_code.part import PartOf
from scoreray.trainer.diffusion.condition import (
    HAS_LENGTH,
    LABEL,
    AnyCondition,
    Condition,
    Conditions,
    ConditionSpec,
    as_condition,
    is_encoded,
)
from scoreray.trainer.diffusion.condition_shapes import check_value
from scoreray.trainer.diffusion.layers import MAX_LAYERS, Attention, call_block, grid_code, require, sinusoids, zero_

MAX_WIDTH = 1 << 14
GRID_IN = "grid_in.weight"  # of every network: the layer that reads `Conditioned.grids`, whose axis 1 they are


@dataclass(frozen=True)
class TextEncoderConfig:
    """The transformer that reads the bytes of a text condition, trained with the rest of the network.

    hidden_size: of a byte's token.  depth: blocks.  num_heads: of attention, in each block.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    hidden_size: int = 128
    depth: int = 2
    num_heads: int = 4

    def __post_init__(self) -> None:
        require(0 < self.depth <= MAX_LAYERS, "text_encoder.depth", self.depth, f"choose 1 to {MAX_LAYERS} blocks")
        require(self.num_heads > 0, "text_encoder.num_heads", self.num_heads, "choose 1 or more heads")
        require(
            0 < self.hidden_size <= MAX_WIDTH and self.hidden_size % self.num_heads == 0 and self.hidden_size % 2 == 0,
            "text_encoder.hidden_size",
            self.hidden_size,
            f"choose a positive even multiple of num_heads, {self.num_heads}",
        )

    def build(self, length: int, width: int, activation_checkpointing: bool) -> nn.Module:
        """A module (UTF-8 bytes uint8 [B, length], mask bool [B, length]) -> [B, length, width]."""
        return TextReader(self, length, width, activation_checkpointing)


AnyTextEncoder = Annotated[TextEncoderConfig, PartOf("text encoder")]
"""The type of a network's `text_encoder` section: ours, or somebody else's."""


class Conditioned(NamedTuple):
    """What a network makes of noise level and conditions before its first block.

    embedding [B, width], SiLU applied. tokens [B, T, width] to attend to, those where mask, bool [B, T], is True: one
    a row at least; None without sequences and text. grids [B, num_grid_channels, *grid]; None without any.
    """

    embedding: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    grids: Tensor | None = None


class Conditioning(nn.Module):
    """(c_noise [B], condition or None, grid of the sample) -> Conditioned.

    A name that the condition lacks is null in all rows; None lacks all. All parameters act in every call, so that each
    has a gradient at every step, on every rank: engines that shard gradients wait for it.
    `cross_attention` False: the network attends to no tokens, and sequences and text enter by their mean alone.
    Raises UserError where a grid has not the sample's number of dimensions, or a value is not of the shape built for.
    """

    def __init__(
        self,
        conditions: Conditions,
        sinusoid_channels: int,
        width: int,
        *,
        num_axes: int,
        text_encoder: TextEncoderConfig,
        cross_attention: bool = True,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.sinusoid_channels = sinusoid_channels
        self.noise_in = nn.Linear(sinusoid_channels, width)
        self.noise_out = nn.Linear(width, width)
        self.conditions, self.num_axes = conditions, num_axes
        label = conditions.get(LABEL)
        self.num_classes = label.num_classes if label is not None else 0
        # By the name that checkpoints of networks with classes alone have.
        self.classes = class_table(self.num_classes, width) if self.num_classes else None
        self.inputs = nn.ModuleDict()
        for name, spec in conditions.items():
            match spec.kind:
                case "class":
                    if name != LABEL:
                        self.inputs[_key(name, spec)] = class_table(spec.num_classes, width)
                case "vector":
                    self.inputs[_key(name, spec)] = VectorInput(spec.shape[0], width)
                case "level":
                    self.inputs[_key(name, spec)] = LevelInput(sinusoid_channels, width)
                case "sequence":
                    read: nn.Module = SequenceReader(spec.shape, width)
                    self.inputs[_key(name, spec)] = TokenInput(read, width, cross_attention)
                case "text":
                    read = text_encoder.build(spec.shape[0], width, activation_checkpointing)
                    self.inputs[_key(name, spec)] = TokenInput(read, width, cross_attention)
                case "concat":
                    if len(spec.shape) != 1 + num_axes:
                        raise UserError(
                            f"data.conditions.{name}: a grid of shape {list(spec.shape)} can't be joined to samples of "
                            f"{num_axes} spatial dimensions; give it kind vector or sequence, or another field"
                        )
        grids = [spec for spec in conditions.values() if spec.kind == "concat"]
        self.num_grid_channels = sum(1 + spec.shape[0] for spec in grids)
        has_tokens = cross_attention and any(spec.kind in HAS_LENGTH for spec in conditions.values())
        self.context_width = width if has_tokens else 0

    def forward(self, c_noise: Tensor, condition: AnyCondition, grid: Sequence[int]) -> Conditioned:
        dtype = self.noise_in.weight.dtype
        h = sinusoids(c_noise, self.sinusoid_channels).to(dtype)
        h = self.noise_out(F.silu(self.noise_in(h)))
        given = as_condition(condition, self.conditions)
        tokens, masks, grids = [], [], []
        for name, spec in self.conditions.items():
            value, mask = values_of(name, spec, given, c_noise)
            if spec.kind == "class":
                table = self.inputs[_key(name, spec)] if self.classes is None or name != LABEL else self.classes
                h = h + table(value + 1)
            elif spec.kind == "concat":
                grids.append(grid_channels(value, mask, grid).to(dtype))
            elif spec.kind in ("vector", "level"):
                h = h + self.inputs[_key(name, spec)](value, mask)
            else:
                pooled, its_tokens, its_mask = self.inputs[_key(name, spec)](value, mask, is_encoded(spec, value))
                h = h + pooled
                if its_tokens is not None:
                    tokens.append(its_tokens)
                    masks.append(its_mask)
        return Conditioned(
            F.silu(h),
            torch.cat(tokens, dim=1) if tokens else None,
            torch.cat(masks, dim=1) if masks else None,
            torch.cat(grids, dim=1) if grids else None,
        )

    def outputs(self, name: str) -> list[str]:
        """Names of the parameters through which a condition acts on the embedding: while they are 0, a value does what
        the null does, nothing. Of a class that is its table; of a grid there are none (`GRID_IN`)."""
        key = _key(name, self.conditions[name])
        match self.conditions[name].kind:
            case "class":
                return ["classes.weight" if name == LABEL else f"inputs.{key}.weight"]
            case "concat":
                return []
            case kind:
                last = {"vector": "second", "level": "level_out"}.get(kind, "pool")
                layer = f"inputs.{key}.{last}"
                return [f"{layer}.weight", f"{layer}.bias"]

    @torch.no_grad()
    def encode(self, condition: Condition) -> Condition:
        """`condition` with its texts read, which `forward` takes as well: what it makes of them depends on no noise
        level. (Keys and values of cross-attention don't either, but are under 1% of a step: 0.2 of 26 ms at 16 rows of
        `configs/shapes.yaml`.)"""
        values, masks = dict(condition.values), dict(condition.masks)
        for name, spec in self.conditions.items():
            if spec.kind == "text" and name in values and not is_encoded(spec, values[name]):
                value, masks[name] = values_of(name, spec, condition, values[name])
                tokens = self.inputs[_key(name, spec)]
                assert isinstance(tokens, TokenInput)
                values[name] = tokens.read(value, masks[name])
        return Condition(values, masks)


def _key(name: str, spec: ConditionSpec) -> str:
    """In a ModuleDict, which refuses names such as `type` and `values`."""
    return f"{spec.kind}_{name}"


def class_table(num_classes: int, width: int) -> nn.Embedding:
    """A vector a class; row 0 is the null class."""
    table = nn.Embedding(num_classes + 1, width)
    nn.init.normal_(table.weight, std=0.5)
    return table


def values_of(name: str, spec: ConditionSpec, given: Condition | None, c_noise: Tensor) -> tuple[Tensor, Tensor]:
    """(values, mask) of one condition for the rows of c_noise [B]: null where nothing is given, 0 under the mask.

    Sequences and text are as long as the network was built for: a row's bits then depend on no padding, a compiled
    network sees one shape, and 0 takes no part, where NaN would.
    """
    if given is None or name not in given.values:
        return spec.null(c_noise.shape[0], c_noise.device)
    value = given.values[name]
    check_value(name, spec, value, given.masks.get(name), c_noise.shape[0])
    mask = given.mask(name)
    if spec.kind == "class":
        return value, mask
    value = value.masked_fill(~mask.view(*mask.shape, *(1,) * (value.ndim - mask.ndim)), 0)
    if spec.kind in HAS_LENGTH and value.shape[1] != spec.shape[0]:
        missing = spec.shape[0] - value.shape[1]
        value = F.pad(value, (0,) * (2 * (value.ndim - 2)) + (0, missing))
        mask = F.pad(mask, (0, missing))
    return value, mask


def grid_channels(value: Tensor, mask: Tensor, grid: Sequence[int]) -> Tensor:
    """value [B, C, ...] at the sample's `grid`, and a channel of ones; all 0 in rows whose mask [B] is False."""
    value = resized(value.to(torch.promote_types(value.dtype, torch.float32)), grid)
    ones = mask.view(-1, *(1,) * (value.ndim - 1)).to(value.dtype).expand(-1, 1, *grid)
    return torch.cat([value, ones], dim=1)


def resized(value: Tensor, grid: Sequence[int]) -> Tensor:
    """value [B, C, ...] at another grid; itself where it has that one.

    Linear where the grid is finer than the value's, pixel centres aligned by their places in the whole; means of the
    pixels that it covers (area) where it is coarser along every axis.
    """
    if tuple(value.shape[2:]) == tuple(grid):
        return value
    if all(new <= old for new, old in zip(grid, value.shape[2:], strict=True)):
        return F.interpolate(value, size=tuple(grid), mode="area")
    mode = ("linear", "bilinear", "trilinear")[len(grid) - 1]
    return F.interpolate(value, size=tuple(grid), mode=mode, align_corners=False)


class VectorInput(nn.Module):
    """(value [B, D], mask bool [B]) -> [B, width]."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.first = nn.Linear(size, width)
        self.second = nn.Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        h = self.second(F.silu(self.first(value.to(self.first.weight.dtype))))
        return torch.where(mask[:, None], h, self.null.to(h.dtype))


class LevelInput(nn.Module):
    """(value [B, 1], mask bool [B]) -> [B, width]: 0 where the mask is False, and everywhere before it is trained, so
    that a network that begins from one without it first gives what that one gives."""

    def __init__(self, sinusoid_channels: int, width: int):
        super().__init__()
        self.sinusoid_channels = sinusoid_channels
        self.first = nn.Linear(sinusoid_channels, width)
        self.level_out = zero_(nn.Linear(width, width))

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        code = sinusoids(value[:, 0], self.sinusoid_channels).to(self.first.weight.dtype)
        return self.level_out(F.silu(self.first(code))).masked_fill(~mask[:, None], 0)


class TokenInput(nn.Module):
    """(values [B, L, ...], mask bool [B, L], is_read) -> pooled [B, width], tokens [B, 1 + L, width], their mask.

    `read`: (values, mask) -> [B, L, width]; with `is_read` values are what it gave. The first token is the null.
    """

    def __init__(self, read: nn.Module, width: int, has_tokens: bool):
        super().__init__()
        self.read = read
        self.pool = nn.Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))
        self.null_token = nn.Parameter(torch.zeros(width)) if has_tokens else None

    def forward(self, value: Tensor, mask: Tensor, is_read: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = (value if is_read else self.read(value, mask)).masked_fill(~mask[:, :, None], 0)
        total = tokens.sum(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        mean = total / mask.sum(1, keepdim=True).clamp(min=1)
        pooled = self.pool(mean.to(tokens.dtype))
        pooled = torch.where(mask.any(1)[:, None], pooled, self.null.to(pooled.dtype))
        if self.null_token is None:
            return pooled, None, None
        null = self.null_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        return pooled, torch.cat([null, tokens], dim=1), F.pad(mask, (1, 0), value=True)


class SequenceReader(nn.Module):
    """(values [B, L, D], mask) -> [B, L, width]: projected, with learned positions."""

    def __init__(self, shape: Sequence[int], width: int):
        super().__init__()
        self.project = nn.Linear(shape[1], width)
        self.positions = nn.Parameter(grid_code(shape[:1], width))

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        h = self.project(value.to(self.project.weight.dtype))
        return h + self.positions.to(h.dtype)


class TextReader(nn.Module):
    """(UTF-8 bytes uint8 [B, L], mask) -> [B, L, width]: a transformer over bytes and a start token."""

    def __init__(self, config: TextEncoderConfig, length: int, width: int, activation_checkpointing: bool):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.bytes = nn.Embedding(256, config.hidden_size)
        # Places weigh little at the start: a word then begins as the same features wherever it stands. With places as
        # strong as bytes, a word that stands elsewhere in each text (the shape in "a small red circle") acts later.
        nn.init.normal_(self.bytes.weight, std=1.0)
        self.positions = nn.Parameter(0.1 * grid_code((1 + length,), config.hidden_size))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.out = nn.Linear(config.hidden_size, width)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        h = F.pad(self.bytes(value.int()), (0, 0, 1, 0)) + self.positions  # the first position is the start token
        mask = F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            h = call_block(block, h, mask, recompute=self.activation_checkpointing and self.training)
        return self.out(F.layer_norm(h[:, 1:], h.shape[-1:]).to(h.dtype))


class TextBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm: (h [B, T, D], mask bool [B, T]) -> [B, T, D]."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, config.num_heads)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        h = h + self.attention(self.norm_attention(h).to(h.dtype), mask=mask)
        return h + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(h).to(h.dtype))))
