"""Power-function EMA: its constants, and that the optimizer's averages follow the profile (Karras 2024)."""

from __future__ import annotations

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.optim.ema import EMAConfig, choose_length, length_name, name_of_std, power_of_std, std_of_power
from scoreray.trainer.optim.optimizer import AveragingAdamW, OptimizerConfig


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.9722), (0.10, 6.9372)])
def test_constants_of_the_paper(std: float, gamma: float) -> None:
    assert power_of_std(std) == pytest.approx(gamma, abs=1e-4)
    assert std_of_power(power_of_std(std)) == pytest.approx(std, rel=1e-12)


def test_averages_are_the_power_function_of_the_weights_path() -> None:
    """theta_bar after n steps is sum_k w_k theta_k with w_k = (1 - beta_k) prod_{j > k} beta_j, summing to 1."""
    ema = EMAConfig(stds=(0.05, 0.2), half_life_images=64, ramp_up=0.5)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = AveragingAdamW([weight], OptimizerConfig(), ema)
    path = []
    for step in range(1, 41):
        weight.grad = torch.randn(3, generator=torch.Generator().manual_seed(step))
        optimizer.prepare_step(0.1, ema.decays(step, 8))
        optimizer.step()
        path.append(weight.detach().clone())
    for i, key in enumerate(optimizer.ema_keys):
        decays = torch.tensor([ema.decays(step, 8)[i] for step in range(1, 41)], dtype=torch.float64)
        later = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
        weights = (1 - decays) * later
        start = decays.prod()  # what is left of the initial weights: nothing, under a power function
        expected = (weights[:, None] * torch.stack(path).double()).sum(0) + start * torch.tensor([1.0, -2.0, 0.5])
        if key != "ema_half-life":
            assert start == 0
            assert weights.sum() == pytest.approx(1.0)
        torch.testing.assert_close(optimizer.state[weight][key].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_profile_has_the_std_that_names_it() -> None:
    """Relative to the run's length, the averaging weights' standard deviation tends to the configured one."""
    steps = 4000
    for std in (0.05, 0.10, 0.25):
        decays = torch.tensor(
            [EMAConfig(stds=(std,)).decays(k, 1)[0] for k in range(1, steps + 1)], dtype=torch.float64
        )
        later = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
        weights = (1 - decays) * later
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        mean = (weights * t).sum()
        assert ((weights * (t - mean) ** 2).sum()).sqrt() == pytest.approx(std, rel=2e-3)


def test_adamw_is_torchs_own() -> None:
    """The step that averages is bitwise AdamW's."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    ours = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    theirs = torch.nn.Parameter(ours.detach().clone())
    averaging = AveragingAdamW([ours], config, EMAConfig())
    plain = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-8, fused=True)
    for step in range(1, 6):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        averaging.prepare_step(0.01, [0.5, 0.5])
        averaging.step()
        plain.step()
    assert torch.equal(ours, theirs)


def test_learning_rate_schedules() -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_images=100)
    assert [constant.rate(n, 1000) for n in (50, 100, 900)] == [0.5, 1.0, 1.0]
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    assert cosine.rate(500, 1000) == pytest.approx(0.5)
    assert cosine.rate(1000, 1000) == pytest.approx(0.0)
    decaying = OptimizerConfig(learning_rate=1.0, schedule="inverse_sqrt", decay_images=100)
    assert [decaying.rate(n, 1000) for n in (50, 400, 900)] == pytest.approx([1.0, 0.5, 1 / 3])


def test_lengths_by_name() -> None:
    ema = EMAConfig(stds=(0.05, 0.1), half_life_images=1000)
    assert ema.names == ("0.050", "0.100", "half-life")
    assert choose_length(None, ema.names, "runs/a") == "0.050"
    assert choose_length("0.1", ema.names, "runs/a") == "0.100"
    assert choose_length(" half-life", ema.names, "runs/a") == "half-life"
    with pytest.raises(UserError, match=r"'0\.2' \('0\.200'\) is not in runs/a: .*accepted: 0\.050, 0\.100, half-life"):
        choose_length("0.2", ema.names, "runs/a")


@pytest.mark.parametrize("spelling", ["{:.3f}", "{:g}", "{:.17g}", "{:e}", "{:.2E}", "+{:.4f}", " {:f} "])
def test_every_spelling_of_a_number_is_one_length(spelling: str) -> None:
    for thousandths in range(5, 281):
        std = thousandths / 1000
        text = spelling.format(std)
        assert length_name(text) == length_name(text.replace("0.", ".")) == f"{std:.3f}"


@pytest.mark.parametrize(
    "text", ["none", "half-life", "nnoe", "", "nan", "inf", "0_05", "\u00b2", "1.2.3", "--5", "0x1"]
)
def test_what_is_no_number_is_its_own_name(text: str) -> None:
    assert length_name(text) == text


def test_a_number_between_two_lengths_is_neither() -> None:
    with pytest.raises(UserError, match=r"'0\.0504': lengths have three decimals; the nearest is 0\.050"):
        length_name("0.0504")
    assert length_name("0.0525", [0.0525]) == name_of_std(0.0525)
