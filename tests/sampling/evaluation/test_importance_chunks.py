"""The density that an autoencoder's objective maximises a bound of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.evaluation.importance_chunks import decoder_of, log_partition
from scoreray.trainer.networks.rbm import RBM
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective


def inputs_of(objective: AutoencodingObjective) -> Any:
    return SimpleNamespace(info=SimpleNamespace(config=SimpleNamespace(objective=objective)))


@pytest.mark.parametrize("reconstruction", ["mse", "l1"])
def test_the_decoders_width_is_the_one_whose_bound_the_objective_maximised(
    reconstruction: Literal["mse", "l1"],
) -> None:
    """The loss times d / kl_weight is, up to a constant, minus the evidence lower bound."""
    objective = AutoencodingObjective(reconstruction=reconstruction, kl_weight=0.02)
    x, decoded, mean = (torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    loss = objective.error(x, decoded, mean, mean.abs() + 0.1) - objective.error(x, x, mean, mean.abs() + 0.1)
    density = decoder_of(inputs_of(objective), None)
    torch.testing.assert_close(loss * 8 / 0.02, density(x, x) - density(x, decoded))
    given = decoder_of(inputs_of(objective), 1.0)
    assert (given(x, decoded) > density(x, decoded)).all()


def test_without_a_kl_weight_the_width_must_be_given() -> None:
    with pytest.raises(UserError, match=r"objective\.kl_weight is 0.*give option iwae\.scale"):
        decoder_of(inputs_of(AutoencodingObjective(kl_weight=0.0)), None)


def test_many_hidden_units_are_annealed() -> None:
    machine = RBM(21, 22).double()
    machine.weight.data.zero_()
    log_z, error = log_partition(machine, 8)
    assert log_z == pytest.approx(43 * torch.log(torch.tensor(2.0)).item(), abs=1e-6)  # independent units
    assert error == pytest.approx(0, abs=1e-9)
