"""The flat engine's fp32 sum of half-precision gradients: of this step's micro-batches, and of nothing before."""

from __future__ import annotations

import pytest
import torch

from scoreray.trainer.engine.base import EngineConfig
from scoreray.trainer.engine.flat import FlatEngine
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.optimizer import OptimizerConfig

ROWS, WIDTH = 4, 6


def engine_of(precision: str, micro_batch_size: int) -> FlatEngine:
    torch.manual_seed(0)
    parts = EngineConfig(precision=precision, micro_batch_size=micro_batch_size), OptimizerConfig(), EMAConfig()
    module = torch.nn.Linear(WIDTH, 1)
    return FlatEngine(module, *parts, rank_batch_size=ROWS, world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("micro_batch_size", [ROWS, 1])
def test_a_step_updates_by_its_own_gradients_alone(precision: str, micro_batch_size: int) -> None:
    engine = engine_of(precision, micro_batch_size)
    images = torch.randn(3, ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    for number, batch in enumerate(images):
        x = batch.clone()
        if number == 1:
            x[-1] = torch.nan  # a step that is refused leaves nothing either
        num_micro = engine.num_micro_batches
        for part in x.split(micro_batch_size):
            engine.backward(engine.module(part.to(engine.module.weight.dtype)).sum() / len(part))
        # The gradient of the mean output is the mean input; each micro-batch's is rounded, their sum in fp32 is not.
        parts = batch.split(micro_batch_size)
        rounded = [(part.float().mean(0) / num_micro).to(engine.module.weight.dtype).float() for part in parts]
        expected = torch.cat([torch.stack(rounded).sum(0), torch.ones(1)])
        if number == 1:
            with pytest.raises(NonFiniteError):
                engine.step(1e-3, [0.0, 0.0])
            continue
        assert float(expected.norm()) == pytest.approx(
            engine.step(1e-3, [0.0, 0.0]), rel=2e-2 if precision == "bf16" else 1e-5
        )
