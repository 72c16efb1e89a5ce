"""One denoiser: every parameterization gives the same D, conversions are exact, mistakes are named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.denoiser import (
    COEFFICIENTS,
    PARAMETERIZATIONS,
    Denoiser,
    DenoiserConfig,
    check_inputs,
    convert,
    tweedie,
)

F64 = torch.float64
SD = 0.5
SIGMAS = torch.logspace(-3, 2, 21, dtype=F64)
NAMES = sorted(COEFFICIENTS)


class Conv(nn.Module):
    """A small network of the project's signature, conditional on noise level and class."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.embed = nn.Embedding(4, 8)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        labels = torch.full((len(x),), -1) if class_labels is None else class_labels
        shift = self.embed(labels + 1) + c_noise[:, None].to(x.dtype)
        return self.last(torch.tanh(self.first(x) + shift[:, :, None, None]))


def conv(seed: int = 0) -> Conv:
    torch.manual_seed(seed)
    return Conv()


def batch(dtype: torch.dtype = torch.float32, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 4, 4, generator=generator, dtype=F64).to(dtype)
    return x, torch.logspace(-2, 1.5, count, dtype=dtype), torch.arange(count) % 4 - 1


def pieces() -> tuple[Tensor, Tensor, Tensor]:
    x0, z = torch.randn(2, len(SIGMAS), 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    return x0, z, x0 + SIGMAS[:, None] * z


def quantity(name: str, x0: Tensor, z: Tensor) -> Tensor:
    """What a perfect network would output, from the clean sample and its noise, by its definition."""
    s = SIGMAS[:, None]
    return {
        "denoised": x0,
        "noise": z,
        "score": -z / s,
        "velocity": z - x0,
        "v": (z - s * x0) / (1 + s**2).sqrt(),
        "edm": (x0 - SD**2 / (s**2 + SD**2) * (x0 + s * z)) * (s**2 + SD**2).sqrt() / (s * SD),
    }[name]


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_any_two_parameterizations_convert_into_each_other_exactly(source, target):
    x0, z, x = pieces()
    value = convert(quantity(source, x0, z), x, SIGMAS, source, target, SD)
    torch.testing.assert_close(value, quantity(target, x0, z), rtol=1e-9, atol=1e-9)
    back = convert(value, x, SIGMAS, target, source, SD)
    torch.testing.assert_close(back, quantity(source, x0, z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_with_the_optimal_network_gives_back_the_clean_sample(name):
    x0, z, x = pieces()
    output = quantity(name, x0, z) * (SIGMAS[:, None] if name == "score" else 1)
    denoiser = Denoiser(lambda *_: output, name, SD)
    torch.testing.assert_close(denoiser(x, SIGMAS), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.score(x, SIGMAS), -z / SIGMAS[:, None], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_sees_unit_variance_and_a_quarter_of_ln_sigma(name):
    seen = {}

    def network(x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        seen.update(x=x, c_noise=c_noise, labels=class_labels)
        return x

    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.002, 1.0, 80.0], dtype=F64)
    x = SD * torch.randn(3, 20_000, generator=generator, dtype=F64)
    x = x + sigma[:, None] * torch.randn(3, 20_000, generator=generator, dtype=F64)
    Denoiser(network, name, SD)(x, sigma)
    assert (seen["x"].var(1) - 1).abs().max() < 5 * math.sqrt(2 / 20_000)
    torch.testing.assert_close(seen["c_noise"], sigma.log() / 4)
    assert seen["labels"] is None


def test_edm_coefficients_are_those_of_the_paper():
    c_skip, c_out = COEFFICIENTS["edm"](torch.tensor([0.5, 80.0], dtype=F64), 0.5)
    torch.testing.assert_close(c_skip, torch.tensor([0.5, 0.25 / 6400.25], dtype=F64))
    torch.testing.assert_close(c_out, torch.tensor([0.25 / math.sqrt(0.5), 40 / math.sqrt(6400.25)], dtype=F64))
    loss_weight = (SIGMAS**2 + SD**2) / (SIGMAS * SD) ** 2
    torch.testing.assert_close(loss_weight * COEFFICIENTS["edm"](SIGMAS, SD)[1] ** 2, torch.ones_like(SIGMAS))


def test_tweedie_of_a_gaussian_is_its_score():
    x = torch.linspace(-3, 3, len(SIGMAS), dtype=F64)[:, None]
    denoised = 0.3 + (x - 0.3) * SD**2 / (SD**2 + SIGMAS[:, None] ** 2)
    torch.testing.assert_close(tweedie(denoised, x, SIGMAS), -(x - 0.3) / (SD**2 + SIGMAS[:, None] ** 2))


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_x_comes_back_whatever_the_network_computes_in(name, dtype):
    x, sigma, labels = batch(dtype)
    for network in (conv(), conv().double(), conv().bfloat16()):
        denoiser = Denoiser(network, name)
        for level in (sigma, sigma.double(), 0.7):
            assert denoiser(x, level, labels).dtype == dtype
            assert denoiser.score(x, level, labels).dtype == dtype


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_bf16_weights_and_autocast_stay_near_float32(name):
    x, sigma, labels = batch()
    exact = Denoiser(conv(), name)(x, sigma, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = Denoiser(conv(), name)(x, sigma, labels)
    half = Denoiser(conv().bfloat16(), name)(x, sigma, labels)
    # bf16 has 8 bits; the output enters D with the factor b(sigma) <= sigma.
    allowed = 0.05 * (1 + sigma).reshape(-1, 1, 1, 1)
    assert ((cast - exact).abs() < allowed).all()
    assert ((half - exact).abs() < allowed).all()


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_batch_of_one_equals_the_row_of_a_batch(name):
    x, sigma, labels = batch(F64)
    denoiser = Denoiser(conv().double(), name)
    whole = denoiser(x, sigma, labels)
    for i in range(len(x)):
        torch.testing.assert_close(denoiser(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1])[0], whole[i])
    torch.testing.assert_close(denoiser(x, 0.7, labels), denoiser(x, torch.full((5,), 0.7, dtype=F64), labels))
    assert torch.equal(denoiser(x, sigma), denoiser(x, sigma, torch.full((5,), -1)))


@pytest.mark.parametrize("name", [name for name in PARAMETERIZATIONS if name.startswith("energy")])
def test_the_score_of_an_energy_denoiser_is_minus_the_gradient_of_its_energy(name):
    x, sigma, labels = batch(F64)
    denoiser = Denoiser(conv().double(), name)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser.energy(x, sigma, labels).sum(), x)
    torch.testing.assert_close(denoiser.score(x, sigma, labels), -gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in PARAMETERIZATIONS if name.startswith("energy")])
def test_energy_denoisers_train_through_second_derivatives_and_run_under_inference_mode(name):
    x, sigma, labels = batch(F64)
    network = conv().double()
    denoiser = Denoiser(network, name)

    def loss() -> Tensor:
        return (denoiser.denoise(x, sigma, labels) ** 2).sum()

    loss().backward()
    weight = network.first.weight
    step = torch.zeros_like(weight)
    step[0, 0, 1, 1] = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            values.append(loss())
            weight -= sign * step
    numeric = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(weight.grad[0, 0, 1, 1], numeric.detach(), rtol=1e-5, atol=1e-8)
    with torch.inference_mode():
        inside = denoiser(x.clone(), sigma.clone(), labels.clone())
    torch.testing.assert_close(inside, denoiser(x, sigma, labels).detach())


def test_denoising_compiles_into_one_graph():
    x, sigma, labels = batch()
    denoiser = Denoiser(conv())
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sigma, labels), denoiser(x, sigma, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma is 0.0: give a finite noise level above 0"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"sigma": torch.tensor([1.0, 1.0, -2.0, 1.0, 1.0])}, "sigma is -2.0"),
        ({"sigma": torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0])}, "sigma is nan"),
        ({"sigma": torch.tensor([1.0, float("inf"), 1.0, 1.0, 1.0])}, "sigma is inf"),
        ({"sigma": torch.ones(4)}, r"sigma has shape \(4,\) and x \(5, 2, 4, 4\)"),
        ({"class_labels": torch.tensor([0, 1, 2, 3, 0])}, "class label 3 is out of range: the network knows 0 to 2"),
        ({"class_labels": torch.tensor([0, 1, -2, 2, 0])}, "class label -2 is out of range"),
        ({"x": torch.zeros(5, 2, 4, 4, dtype=torch.uint8)}, "x is torch.uint8: give floating-point samples"),
        ({"class_labels": torch.zeros(5)}, "class_labels are torch.float32"),
        ({"class_labels": torch.zeros(3, dtype=torch.long)}, "one integer for each of the 5 samples"),
    ],
)
def test_bad_input_is_named(change, message):
    x, sigma, labels = batch()
    with pytest.raises(UserError, match=message):
        Denoiser(conv())(**{"x": x, "sigma": sigma, "class_labels": labels, **change})


def test_an_empty_batch_stays_empty():
    x, sigma, labels = batch(count=0)
    assert Denoiser(conv())(x, sigma, labels).shape == (0, 2, 4, 4)


def test_nan_inputs_are_named_by_check_inputs():
    x, sigma, labels = batch()
    check_inputs(x, sigma, labels, 3)
    x[0, 0, 0, :3] = math.nan
    with pytest.raises(UserError, match="x has 3 values that are not finite"):
        check_inputs(x, sigma, labels, 3)


def test_unknown_names_come_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'velocity'"):
        Denoiser(conv(), "velocty")
    with pytest.raises(UserError, match="did you mean 'noise'"):
        DenoiserConfig(parameterization="nois")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sigma_data is 0"):
        DenoiserConfig(sigma_data=0.0)
    with pytest.raises(UserError, match="'edm' has no energy; those that have one: energy_dot"):
        Denoiser(conv()).energy(*batch())


def test_a_network_that_changes_the_shape_is_named():
    x, sigma, _ = batch()
    with pytest.raises(UserError, match=r"the network gave \(5, 1, 4, 4\) for x \(5, 2, 4, 4\)"):
        Denoiser(lambda x, *_: x[:, :1])(x, sigma)
