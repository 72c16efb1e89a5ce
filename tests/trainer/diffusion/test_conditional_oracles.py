"""Conditional denoisers against closed forms: linear-Gaussian pairs and captions, in any combination, and mixtures."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scoreray.data.fields.normalisation import Normaliser
from scoreray.trainer.config.condition_values import normalised
from scoreray.trainer.config.run_fields import TARGET_STD
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.diffusion.targets import Mixture
from scoreray.trainer.networks.conditioning import TextEncoderConfig
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.step import TrainingModule

B, STEPS, NOISE = 256, 300, 0.25
UNIT = Normaliser("channel", (3.0, 3.0), (2.0, 2.0))
SPECS = {
    "place": ConditionSpec("vector", (2,), normaliser=UNIT),
    "tokens": ConditionSpec("sequence", (3, 2), normaliser=UNIT),
    "coarse": ConditionSpec("concat", (1, 2), normaliser=Normaliser("channel", (3.0,), (2.0,))),
    "caption": ConditionSpec("text", (3,)),
}
WEIGHTS = {"place": 0.4, "tokens": 0.3, "coarse": 0.3}
CAPTIONS = {"on": (0.4, 0.0), "no": (-0.4, 0.0), "off": (0.0, 0.6)}  # the first two differ in the order of bytes alone
"""x = a caption's mean + sum of w_i R_i c_i + NOISE e, with captions of one probability, c_i ~ N(0, I) and R a quarter
turn of `place`: so x given the caption and some of the c_i is N(their sum, (NOISE^2 + sum of the other w_i^2) I), and
without the caption the mixture of these."""


def pairs(n: int, seed: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
    """(x [n, 1, 2], its condition in the data's own units 3 + 2 c, what each adds to x [n, 1, 2])."""
    g = torch.Generator().manual_seed(seed)
    c = {name: torch.randn(n, 2, generator=g) for name in WEIGHTS}
    apart = torch.randn(n, 3, 2, generator=g)
    mask = torch.arange(3) < torch.randint(1, 4, (n, 1), generator=g)
    mean = (apart * mask[:, :, None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    tokens = c["tokens"][:, None] + 0.5 * (apart - mean)  # of any length, and their mean is c
    values = {"place": 3 + 2 * c["place"], "tokens": 3 + 2 * tokens, "coarse": 3 + 2 * c["coarse"][:, None]}
    turned = torch.stack([-c["place"][:, 1], c["place"][:, 0]], 1)
    adds = {name: WEIGHTS[name] * (turned if name == "place" else c[name])[:, None] for name in WEIGHTS}
    which = torch.randint(len(CAPTIONS), (n,), generator=g)
    adds["caption"] = torch.tensor([*CAPTIONS.values()])[which, None]
    padded = torch.tensor([[*caption.encode().ljust(3, b"?")] for caption in CAPTIONS], dtype=torch.uint8)
    lengths = torch.tensor([*map(len, CAPTIONS)])
    x = sum(adds.values()) + NOISE * torch.randn(n, 1, 2, generator=g)
    masks = {"tokens": mask, "caption": torch.arange(3) < lengths[which, None]}
    return x, Condition(values | {"caption": padded[which]}, masks), adds


@pytest.fixture(scope="module")
def trained() -> TrainingModule:
    torch.manual_seed(0)
    network = MLPConfig(64, 2, TextEncoderConfig(16, 1, 2)).build((1, 2), SPECS)
    step = TrainingModule(
        Denoiser(network, sigma_data=TARGET_STD), EDMObjective(label_dropout=0.1), EDM(), seed=0, global_batch_size=B,
        dropout=dict.fromkeys(SPECS, 0.25),
    )  # fmt: skip
    x, condition, _ = pairs(B * STEPS, 0)
    return fitted(step, x, condition, STEPS)


def fitted(step: TrainingModule, x: Tensor, condition: Condition | None, steps: int) -> TrainingModule:
    rows, optimizer = len(x) // steps, torch.optim.Adam(step.parameters(), lr=5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for positions in torch.arange(len(x)).split(rows):
        part = slice(int(positions[0]), int(positions[-1]) + 1)
        loss, _ = step(x[part], None if condition is None else condition[part], positions)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return step.eval()


@pytest.mark.parametrize("given", [names for k in range(5) for names in itertools.combinations(SPECS, k)], ids="+".join)
def test_the_posterior_given_any_of_the_conditions_is_reached_and_given_none_the_marginal(
    trained: TrainingModule, given: tuple[str, ...]
) -> None:
    n, sigma = 4000, 0.4
    x0, condition, adds = pairs(n, 1)
    x = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    dropped = normalised(condition, SPECS).null([name for name in SPECS if name not in given])

    def posterior(names: tuple[str, ...]) -> Tensor:
        mean = sum((adds[name] for name in names), torch.zeros_like(x))
        variance = NOISE**2 + sum(WEIGHTS[name] ** 2 for name in WEIGHTS if name not in names)
        means = mean if "caption" in names else mean + torch.tensor([*CAPTIONS.values()])  # [n, 1 or captions, 2]
        weights = (-(x - means).square().sum(2, keepdim=True) / (2 * (variance + sigma**2))).softmax(1)
        return (variance * x + sigma**2 * (weights * means).sum(1, keepdim=True)) / (variance + sigma**2)

    with torch.no_grad():
        distance = (trained.denoiser(x, torch.full((n,), sigma), dropped) - posterior(given)).square().mean()
    marginal = posterior(())
    scale = (posterior(tuple(SPECS)) - marginal).square().mean()  # of what all conditions say
    assert float(distance / scale) < 0.05
    if given:  # far nearer than without what each says
        assert float(distance) < 0.25 * float((posterior(given) - marginal).square().mean())


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        pytest.param(UNetConfig(8, (1,), 1, ()), (1, 2, 3, 2), id="a U-Net, 3-D", marks=pytest.mark.slow),
        pytest.param(DiTConfig(1, 16, 1, 2), (1, 6), id="a DiT, 1-D"),
    ],
)
def test_mixtures_over_signals_and_volumes_are_learnt(config: UNetConfig | DiTConfig, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    means = 0.6 * torch.randn(2, *shape).sign()
    target, steps, sigma, n = Mixture(means, 0.2), 150, 0.7, 2000
    step = TrainingModule(Denoiser(config.build(shape)), EDMObjective(), EDM(), seed=0, global_batch_size=64)
    g = torch.Generator().manual_seed(1)
    fitted(step, target.sample(64 * steps, g).float(), None, steps)
    x0 = target.sample(n, g).float()
    x = x0 + sigma * torch.randn(x0.shape, generator=g)
    exact = target(x, sigma)
    linear = x * 0.4 / (0.4 + sigma**2)  # the best for data of this variance, 0.6^2 + 0.2^2
    with torch.no_grad():
        distance = (step.denoiser(x, sigma) - exact).square().mean()
    assert float(distance / (linear - exact).square().mean()) < 0.2
