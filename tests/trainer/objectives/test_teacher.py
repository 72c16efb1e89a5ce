"""The teacher of a few-step model: its config, its guidance, and that a training module does not hold it as its own."""

from __future__ import annotations

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import LABEL, Condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.levels import GUIDANCE_WEIGHT
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.objectives.teacher import Teacher, TeacherConfig
from scoreray.trainer.step import TrainingModule


def classified(num_classes: int = 2) -> Denoiser:
    torch.manual_seed(0)
    network = MLPConfig(hidden_size=8, num_layers=1).build([2], num_classes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return Denoiser(network)


def test_a_teacher_is_guided_by_one_weight_or_by_each_samples_own() -> None:
    denoiser, x, sigma = classified(), torch.randn(3, 2), torch.tensor([0.5, 2.0, 9.0])
    labels, weights = torch.tensor([0, 1, 1]), torch.tensor([[1.5], [4.0], [7.0]])
    null, strong = denoiser(x, sigma, torch.full_like(labels, -1)), denoiser(x, sigma, labels)
    assert (strong - null).abs().amax(1).min() > 0.05

    torch.testing.assert_close(Teacher(denoiser, 3.0).denoise(x, sigma, labels), null + 3 * (strong - null))
    torch.testing.assert_close(Teacher(denoiser).denoise(x, sigma, Condition({LABEL: labels})), strong)

    given = Condition({LABEL: labels, GUIDANCE_WEIGHT: weights}, {GUIDANCE_WEIGHT: torch.tensor([True, True, False])})
    drawn = torch.tensor([[1.5], [4.0], [1.0]])  # the null weight is 1, whatever stands under its mask
    torch.testing.assert_close(Teacher(denoiser).denoise(x, sigma, given), null + drawn * (strong - null))


def test_a_training_module_neither_trains_nor_stores_its_teacher() -> None:
    module = TrainingModule(classified(), EDMObjective(), EDM(), seed=0, global_batch_size=4)
    names, stored = [name for name, _ in module.named_parameters()], list(module.state_dict())
    teacher = classified()
    module.teacher = Teacher(teacher)
    module.train().double()
    assert [name for name, _ in module.named_parameters()] == names
    assert list(module.state_dict()) == stored
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert next(teacher.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("guidance", "said"),
    [((4.0, 4.0), "lowest weight must be below the highest"), (101.0, "between -100 and 100"), ((0.0, 1e9), "between")],
)
def test_a_teachers_guidance_that_makes_no_sense_is_refused(guidance: float | tuple[float, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TeacherConfig("runs/teacher", guidance=guidance)
