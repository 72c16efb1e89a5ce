"""Buffers that keep their precision when weights are cast, and buffers that are training state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose buffers keep dtype and bits when it, or one around it, is cast (to bf16, say); they do move.

    Noise levels, running errors and chains would be rounded to bf16's 8 bits by the engine's cast of the weights.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self


def state_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module's `state_dict` by name; not those that its config determines (persistent=False)."""
    state = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in state}
