"""MMDiT, a transformer in which patches and tokens of conditions attend to each other, as in SD3 (Esser 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.trainer.diffusion.condition import Conditions
from scoreray.trainer.diffusion.layers import call_block, zero_
from scoreray.trainer.networks.conditioning import Conditioned
from scoreray.trainer.networks.dit import DiT, DiTBlock, TransformerConfig, modulated


@dataclass(frozen=True)
class MMDiTConfig(TransformerConfig):
    """An MMDiT. Without sequences and texts among its conditions it is a DiT."""

    kind: Literal["mmdit"] = field(default="mmdit", kw_only=True)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> MMDiT:
        return MMDiT(self, image_shape, conditions)


class MMDiT(DiT):
    """A DiT whose blocks change the tokens of sequences and texts too (Esser 2024, figure 2)."""

    def block(self, number: int) -> nn.Module:
        if not self.embedding.context_width:
            return DiTBlock(self.config)
        return JointBlock(self.config) if number < self.config.depth else LastJointBlock(self.config)

    def through_blocks(self, h: Tensor, given: Conditioned) -> Tensor:
        context, mask = given.tokens, given.mask
        if context is None or mask is None:
            return super().through_blocks(h, given)
        mask = F.pad(mask, (h.shape[1], 0), value=True)
        recompute = self.config.activation_checkpointing and self.training
        for number, block in enumerate(self.blocks, 1):
            h, context = call_block(block, h, given.embedding, context, mask, recompute=recompute)
            self.keep(number, h)
        return h


class JointBlock(nn.Module):
    """A sample's tokens and those of its conditions, each through layers of their own; in attention, all attend to all.

    (x [B, T, D], emb [B, D], context [B, S, D], mask bool [B, T + S]) -> (x, context); the identity before training.
    What stands under a False mask is changed as well, and acts on no other token.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.image, self.context = DiTBlock(config), DiTBlock(config)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, *of_mlp = self.image.modulations(emb)
        of_image = self.image.attention.heads(modulated(x, shift, scale))
        shift, scale, context_gate, *of_context_mlp = self.context.modulations(emb)
        of_context = self.context.attention.heads(modulated(context, shift, scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_image, of_context, strict=True))
        mixed = self.image.attention.mixed(q, k, v, mask)
        for_image, for_context = mixed.split([x.shape[1], context.shape[1]], dim=1)
        x = self.image.gated(x, gate, self.image.attention.out(for_image))
        context = self.context.gated(context, context_gate, self.context.attention.out(for_context))
        return self.image.after_mlp(x, *of_mlp), self.context.after_mlp(context, *of_context_mlp)


class LastJointBlock(nn.Module):
    """`JointBlock` without what would become of the context, which nothing reads: it has keys and values alone."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.hidden_size
        self.image = DiTBlock(config)
        self.modulation = zero_(nn.Linear(width, 2 * width))
        self.context_kv = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.image.attention
        shift, scale, gate, *of_mlp = self.image.modulations(emb)
        q, *of_image = attention.heads(modulated(x, shift, scale))
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=2)
        of_context = attention.keys_and_values(self.context_kv(modulated(context, shift, scale)))
        k, v = (torch.cat(pair, dim=2) for pair in zip(of_image, of_context, strict=True))
        x = self.image.gated(x, gate, attention.out(attention.mixed(q, k, v, mask)))
        return self.image.after_mlp(x, *of_mlp), context
