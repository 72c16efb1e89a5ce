"""Representation alignment (REPA; Yu 2024): hidden tokens of a transformer drawn to features of the clean sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.fields.field import Field
from scoreray.trainer.networks.dit import DiT
from scoreray.trainer.objectives.base import AlignmentConfig


class Alignment(nn.Module):
    """(network, features [B, F, *grid]) -> [B]: weight (1 - mean cosine similarity of the sample's tokens).

    It reads the tokens of the network's last call (`DiT.kept`), through a perceptron that is trained and stored in
    checkpoints beside the network, and is no part of what is exported.
    Raises UserError where the features are not one for each token of the network.
    """

    def __init__(self, config: AlignmentConfig, network: nn.Module, shape: Sequence[int], features: Field):
        super().__init__()
        assert isinstance(network, DiT), "the config has been checked"
        self.config, self.grid = config, network.config.num_tokens(shape)
        is_grid = features.kind == "array" and len(features.shape) > 2
        found = tuple(features.shape[1:]) if is_grid else (features.shape[0],)
        if found not in (self.grid, (math.prod(self.grid),)):
            raise UserError(
                f"objective.alignment.field: '{features.name}' of shape {features.shape} has "
                f"{'x'.join(map(str, found))} tokens, the network {'x'.join(map(str, self.grid))} = "
                f"{math.prod(self.grid)}; encode it at another size, or change network.patch_size"
            )
        self.channels_first = is_grid
        num_features = features.shape[0] if is_grid else features.shape[1]
        network.kept_block = config.layer
        width = config.hidden_size
        first, second = nn.Linear(network.config.hidden_size, width), nn.Linear(width, width)
        self.project = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(width, num_features))

    def on_grid(self, features: Tensor) -> Tensor:
        """Of a batch as it is stored, [B, L, F] or [B, F, *grid]: [B, F, *grid]."""
        return features if self.channels_first else features.mT.unflatten(2, self.grid)

    def forward(self, network: nn.Module, features: Tensor) -> Tensor:
        assert isinstance(network, DiT)
        assert network.kept is not None
        tokens, network.kept = network.kept, None
        similarity = F.cosine_similarity(self.project(tokens).float(), features.flatten(2).mT.float(), dim=2)
        return self.config.weight * (1 - similarity.mean(1))
