"""`scoreray evaluate` of an exact model: what it prints of ensembles are the closed forms of linear-Gaussian pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoreray.cluster.cli import main as cli
from scoreray.cluster.verbs import evaluate as verb
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.packing.pack import pack
from scoreray.data.sources.field_options import parse_field_options
from scoreray.sampling.evaluation import loaded
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.model.describe import Description
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec

SIGMA_DATA, RECORDS, MEMBERS = 0.5, 300, 8
UNITS = Normaliser("channel", (280.0, 1000.0), (20.0, 5.0))
"""Of the target's two channels, say kelvins and hectopascals."""


@dataclass(frozen=True)
class Pair:
    """x = gain c + N(0, covariance), of the flat values x [d] of a sample [2, *grid] and c [m] of a condition."""

    name: str
    spec: ConditionSpec
    grid: tuple[int, ...]
    gain: Tensor
    covariance: Tensor
    condition_std: Tensor

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(samples in units of their own, what conditions them)."""
        g = torch.Generator().manual_seed(1)
        c = torch.randn(n, len(self.condition_std), generator=g).double() @ self.condition_std.T
        noise = torch.randn(n, len(self.covariance), generator=g).double()
        x = c @ self.gain.T + noise @ torch.linalg.cholesky(self.covariance).T
        return UNITS.invert(x.view(n, 2, *self.grid)).float(), c.view(n, *self.spec.shape).float()


def vector_pair() -> Pair:
    """Two numbers act on six values, one channel of which varies twice as much given them."""
    gain = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double() * 0.3
    covariance = torch.diag(torch.tensor([0.1, 0.1, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64).square())
    return Pair("place", ConditionSpec("vector", (2,)), (3,), gain, covariance, torch.eye(2, dtype=torch.float64))


def field_pair() -> Pair:
    """A Gaussian random field on a ring of 4 x 4 points, its two channels correlated, given noisy means over 2 x 2
    points: the mean of what it may be is the Wiener filter."""
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    steps = (places[:, None] - places[None]).abs()
    near = (-torch.minimum(steps, 4 - steps).sum(2) / 2).exp()
    prior = 0.25 * torch.kron(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64), near)
    block = (places // 2) @ torch.tensor([2.0, 1.0], dtype=torch.float64)
    means = torch.kron(torch.eye(2, dtype=torch.float64), torch.nn.functional.one_hot(block.long()).T.contiguous() / 4)
    observed = means @ prior @ means.T + 0.01 * torch.eye(8, dtype=torch.float64)
    gain = prior @ means.T @ torch.linalg.inv(observed)
    spec = ConditionSpec("concat", (2, 2, 2))
    return Pair("coarse", spec, (4, 4), gain, prior - gain @ means @ prior, torch.linalg.cholesky(observed))


class Exact(nn.Module):
    """The network whose output is E[x0 | x, c] of a pair: mu + P (P + sigma^2)^-1 (x - mu), mu = gain c."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair
        self.conditions: Conditions = {pair.name: pair.spec}
        self.placeholder = nn.Parameter(torch.zeros(()))  # a network says by its weights where and how wide it is
        self.variances, self.axes = torch.linalg.eigh(pair.covariance)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        sigma = (4 * c_noise).exp().double()[:, None]
        flat = x.flatten(1).double() * (sigma.square() + SIGMA_DATA**2).sqrt()
        mean = condition.values[self.pair.name].flatten(1).double() @ self.pair.gain.T
        kept = self.variances / (self.variances + sigma.square())
        return (mean + ((flat - mean) @ self.axes * kept) @ self.axes.T).view(x.shape).to(x.dtype)


@pytest.mark.parametrize("make", [vector_pair, field_pair])
def test_ensembles_of_an_exact_model_have_the_scores_of_the_closed_form(
    make: Callable[[], Pair],
    new_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Given c, members and what is observed are draws of N(mu, P): so with s_i^2 = P_ii in the data's own units, the
    CRPS is the mean of s_i / sqrt(pi) (Gneiting 2005, eq. 5), the squared error of the mean of M members the mean of
    s_i^2 (1 + 1/M), and the spread is the skill."""
    pair, data = make(), str(tmp_path / "data")
    x, c = pair.draw(RECORDS)
    np.savez(tmp_path / "pairs.npz", state=x.numpy(), **{pair.name: c.numpy()})
    fields = ("state=state", f"{pair.name}={pair.name}")
    pack(tmp_path / "pairs.npz", data, fields=parse_field_options(fields))
    target = TargetField("state", "array", "float32", UNITS)
    run = new_run(
        str(tmp_path / "run"), shape=(2, *pair.grid), classes=[], target=target, conditions={pair.name: pair.spec}
    )

    def exact(found: Description, device: object) -> LoadedDenoiser:
        denoiser = LoadedDenoiser(Exact(pair), "denoised", SIGMA_DATA)
        denoiser.info = found.info
        return denoiser

    monkeypatch.setattr(loaded, "load_described", exact)
    monkeypatch.setattr(verb, "evaluate_on_ray", lambda settings, **options: evaluate(settings))
    command = ["evaluate", run, "--reference", data, "--metrics", "crps,rmse,spread_skill", "--ensembles", str(RECORDS),
               "--per-condition", str(MEMBERS), "--batch-size", "256", "--sampler", "dpmpp_2m",
               "--steps", "40"]  # fmt: skip
    cli.app([*command, "--json"], standalone_mode=False)
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    variance = pair.covariance.diagonal().view(2, -1) * torch.tensor(UNITS.scale)[:, None] ** 2
    expected = {
        "crps": variance.sqrt().mean(1) / math.sqrt(math.pi),
        "rmse": (variance.mean(1) * (1 + 1 / MEMBERS)).sqrt(),
        "spread_skill": torch.ones(2),
    }
    cli.app(command, standalone_mode=False)
    printed = capsys.readouterr().out
    for name, channels in expected.items():
        found = metrics[name]
        assert abs(found["value"] - float(channels.mean())) < 3 * found["std_error"], name
        assert found["std_error"] < 0.05 * found["value"]
        assert found["channels"] == pytest.approx(channels.tolist(), rel=0.12), "kelvins and hectopascals"
        line = next(line for line in printed.splitlines() if line.strip().startswith(name))
        assert line.endswith("by channel " + ", ".join(f"{value:.4g}" for value in found["channels"]))


def test_densities_of_an_exact_model_are_the_closed_form(
    new_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given c, data are N(mu, P): the bound is that log-density, nothing of the loss is avoidable, and the data are no
    outliers among the model's own samples. Against a zero denoiser the divergence is E |D|^2."""
    pair, data = vector_pair(), str(tmp_path / "data")
    x, c = pair.draw(RECORDS)
    np.savez(tmp_path / "pairs.npz", state=x.numpy(), **{pair.name: c.numpy()})
    pack(tmp_path / "pairs.npz", data, fields=parse_field_options(("state=state", f"{pair.name}={pair.name}")))
    target = TargetField("state", "array", "float32", UNITS)
    run = new_run(
        str(tmp_path / "run"), shape=(2, *pair.grid), classes=[], target=target, conditions={pair.name: pair.spec}
    )
    (tmp_path / "truth.py").write_text("def nothing(x, sigma, condition):\n    return 0 * x\n")
    monkeypatch.syspath_prepend(tmp_path)

    def exact(found: Description, device: object) -> LoadedDenoiser:
        denoiser = LoadedDenoiser(Exact(pair), "denoised", SIGMA_DATA)
        denoiser.info = found.info
        return denoiser

    monkeypatch.setattr(loaded, "load_described", exact)
    monkeypatch.setattr(verb, "evaluate_on_ray", lambda settings, **options: evaluate(settings))
    command = ["evaluate", run, "--reference", data, "--metrics", "elbo,fisher,calibration,ood", "--loss-count", "200",
               "--likelihood-count", "64", "--batch-size", "64", "--steps", "32", "--metric-option",
               "fisher.against=truth:nothing", "--metric-option", "ood.statistic=likelihood"]  # fmt: skip
    cli.app([*command, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)["metrics"]
    offset = (UNITS.apply(x).flatten(1).double() - c.flatten(1).double() @ pair.gain.T)[:: RECORDS // 64][:64]
    exactly = torch.distributions.MultivariateNormal(torch.zeros(6).double(), pair.covariance).log_prob(offset)
    assert abs(found["elbo"]["value"] - float(exactly.mean())) < 3 * found["elbo"]["std_error"] + 0.05
    assert found["calibration"]["value"] < 3 * found["calibration"]["std_error"]
    assert min(found["calibration"]["p_values"]) > 1e-4
    assert found["ood"]["ks_p_value"] > 1e-3
    assert 0 < found["fisher"]["divergence"][-1] < found["fisher"]["divergence"][0]
    lowest = float(UNITS.apply(x).double().square().mean())
    sigma = found["fisher"]["sigmas"][0]
    assert found["fisher"]["divergence"][0] == pytest.approx(6 * lowest / sigma**4, rel=0.1)
