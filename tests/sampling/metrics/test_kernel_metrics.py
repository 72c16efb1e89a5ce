"""Metrics by kernels, of arrays in place of stored chunks: KID is a case of MMD, options reach the mathematics."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.measures import distances, kde
from scoreray.sampling.metrics import kernel_metrics
from scoreray.sampling.metrics.kernel_metrics import kernel_density, kid, mmd
from scoreray.sampling.metrics.registry import checked_options


def arrays(samples: Tensor, reference: Tensor) -> Any:
    rows = min(len(samples), len(reference))
    return SimpleNamespace(both=lambda name: (samples, reference), inputs=SimpleNamespace(num_rows=rows))


@pytest.fixture
def stored() -> Any:
    generator = torch.Generator().manual_seed(0)
    return arrays(torch.randn(300, 3, generator=generator), 0.3 + torch.randn(400, 3, generator=generator))


def test_kid_is_mmd_under_its_polynomial(stored: Any) -> None:
    found = mmd(stored, kernel="polynomial", permutations=0)
    assert found.estimate == kid(stored).estimate
    assert found.beside == kid(stored).beside == {"blocks": 10}


def test_bandwidth_is_the_references_median_distance_and_sets_apart_have_a_small_p(stored: Any) -> None:
    found, (_, reference) = mmd(stored, permutations=99), stored.both("features")
    assert found.beside["bandwidth"] == pytest.approx(float(torch.pdist(reference.double()).median()), rel=0.02)
    assert found.beside["p_value"] == 0.01
    assert mmd(arrays(reference[::2], reference[1::2]), permutations=99).beside["p_value"] > 0.05
    kernels = ("gaussian", "mixture", "laplacian", "polynomial", "linear")
    values = [mmd(stored, kernel=kernel, permutations=0).estimate.value for kernel in kernels]
    assert len(set(values)) == 5
    assert mmd(stored, estimator="biased").estimate.value > found.estimate.value


def test_a_kernel_of_somebody_elses_is_called_and_its_mistakes_are_one_line(
    stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"mmd": {"kernel": "pkg.mod:Name"}}
    assert checked_options(given, ("mmd",)) == given
    with pytest.raises(UserError, match=r"must be one of gaussian, .*, or package\.module:Name"):
        checked_options({"mmd": {"kernel": "gauss"}}, ("mmd",))
    monkeypatch.setattr(kernel_metrics, "instance", lambda name, what: distances.linear_kernel)
    assert mmd(stored, kernel="pkg.mod:Name", permutations=0) == mmd(stored, kernel="linear", permutations=0)  # type: ignore[arg-type]
    monkeypatch.setattr(kernel_metrics, "instance", lambda name, what: lambda x, y: x @ x.T)
    with pytest.raises(UserError, match=r"mmd.kernel pkg.mod:Name: gave \[30, 30\]; a tensor \[30, 40\] is needed"):
        mmd(stored, kernel="pkg.mod:Name")  # type: ignore[arg-type]


def test_density_takes_kernel_rule_and_a_bandwidth_for_each_dimension(stored: Any) -> None:
    samples, reference = stored.both("values")
    fixed = kernel_density(stored, kernel="exponential", bandwidth=0.5)
    assert fixed.estimate.value == pytest.approx(float(kde.log_density(reference, samples, 0.5, "exponential").mean()))
    each = kernel_density(stored, rule="silverman", per_dimension=True)
    torch.testing.assert_close(torch.tensor(each.beside["bandwidths"], dtype=torch.float64),
                               kde.by_rule(samples, "silverman", per_dimension=True))  # fmt: skip
    chosen = kernel_density(stored, per_dimension=True).estimate.value
    assert chosen == pytest.approx(kernel_density(stored).estimate.value, abs=0.1)  # of an isotropic Gaussian
    narrow = kernel_density(stored, kernel="tophat", bandwidth=0.2)
    assert narrow.estimate.value == -math.inf
    assert 0 < narrow.beside["covered"] < 1
    assert "have no density under kernel 'tophat'" in narrow.warnings[0]
