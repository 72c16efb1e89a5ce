"""Distances between sets: closed forms, scipy, torchmetrics and torch-fidelity's Inception say the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.stats import kstest, wasserstein_distance
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.measures import distances, frechet
from scoreray.sampling.measures.inception import InceptionV3
from scoreray.trainer.diffusion import noise


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return noise.normal(seed, torch.arange(n), (d,), dtype=torch.float64)


def of_gaussian(mean: Tensor, covariance: Tensor) -> frechet.FeatureMoments:
    """Moments that are exactly a Gaussian's, as a million samples would have them."""
    n = 10**6
    return frechet.FeatureMoments(n, torch.zeros_like(mean), covariance * (n - 1), mean)


def exactly(n: int, d: int) -> Tensor:
    """Samples whose mean is 0 and whose covariance is I, exactly."""
    x = normal(n, d)
    x = x - x.mean(0)
    return torch.linalg.qr(x)[0] * math.sqrt(n - 1)


def test_the_distance_of_shifted_gaussians_is_the_square_of_the_shift() -> None:
    """FID(N(0, I), N(m, I)) = |m|^2."""
    x, m = exactly(500, 16), torch.linspace(-1, 2, 16, dtype=torch.float64)
    assert frechet.frechet(x, x + m) == pytest.approx(float(m @ m), abs=1e-9)
    assert frechet.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_scaled_and_commuting_covariances() -> None:
    """tr (C1^(1/2) - C2^(1/2))^2 where they commute: (2 - 1)^2 a dimension for N(0, I) and N(0, 4 I)."""
    x = exactly(400, 12)
    assert frechet.frechet(x, 2 * x) == pytest.approx(12.0, abs=1e-9)
    a, b = torch.tensor([0.0, 1.0, 4.0]).double(), torch.tensor([1.0, 9.0, 4.0]).double()
    left, right = (of_gaussian(torch.zeros(3).double(), c.diag()) for c in (a, b))
    value = frechet.distance(frechet.Reference.of(left), right)
    assert value == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-7)  # one of them singular


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_neighbours_far_from_the_origin_are_those_at_it(offset: float) -> None:
    """Squares of 1e9 have no digits left for distances of 1: the product formula gave distances of 0 to 900."""
    a, b = (offset + normal(200, 8, seed) for seed in (0, 1))
    exact, order = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    found, numbers = distances.nearest(a, b, 3)
    torch.testing.assert_close(found, exact[:, :3], rtol=1e-7, atol=0)
    assert torch.equal(numbers, order[:, :3])
    there = [value.value for value in distances.precision_recall(a, b)]
    assert there == [value.value for value in distances.precision_recall(a - offset, b - offset)]


@pytest.mark.parametrize("n", [40, 900])  # fewer samples than dimensions, and more
def test_eigenvalues_give_what_a_matrix_square_root_and_torchmetrics_give(n: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = normal(1000, 64) @ (torch.eye(64).double() + 0.1 * normal(64, 64, 3)), 1.3 * normal(n, 64, 1) + 0.2
    ours = frechet.frechet(a, b)
    ma, mb = frechet.moments(a), frechet.moments(b)
    theirs = float(_compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()))
    assert ours == pytest.approx(theirs, rel=1e-6)
    if n > 64:
        ca, cb = ma.covariance, mb.covariance
        root = np.trace(linalg.sqrtm((ca @ cb).numpy())).real  # as most FID code has it
        assert ours == pytest.approx(float((ma.mean - mb.mean).square().sum() + (ca + cb).trace() - 2 * root), rel=1e-6)


def test_torchmetrics_frechet_inception_distance_on_the_same_features() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = normal(600, 16).float(), (normal(500, 16, 1) * 1.2 + 0.1).float()
    theirs = FrechetInceptionDistance(feature=_Given(16), normalize=True, input_img_size=(1, 4, 4)).set_dtype(
        torch.float64
    )
    theirs.update(a.view(-1, 1, 4, 4).double(), real=True)
    theirs.update(b.view(-1, 1, 4, 4).double(), real=False)
    assert frechet.frechet(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_kid_is_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(200, 24), normal(150, 24, 1) + 0.3
    assert distances.kernel_distance(a, b) == pytest.approx(_unbiased_mmd(a.numpy(), b.numpy()), rel=1e-9)
    same = normal(200, 24, 1) + 0.3
    assert distances.kernel_distance(a, same) == pytest.approx(float(poly_mmd(a, same)), rel=1e-6)


def test_kid_is_unbiased() -> None:
    """Its mean over blocks of one distribution is 0 within its own error, where the biased one is far above."""
    a, b = normal(2000, 8), normal(2000, 8, 1)
    estimate = distances.mmd((a[i::20], b[i::20]) for i in range(20))
    assert estimate.std_error is not None
    assert abs(estimate.value) < 3 * estimate.std_error
    biased = np.mean([_biased_mmd(a[i::20].numpy(), b[i::20].numpy()) for i in range(20)])
    assert biased > 10 * estimate.std_error


def squared_mmd_of_gaussians(h: float, dims: int, shift: float, a: float, b: float) -> float:
    """Under exp(-|x - y|^2 / (2 h^2)), of N(0, a^2 I) and N(shift 1, b^2 I): each mean is that of a Gaussian."""

    def mean(variance: float, square: float = 0.0) -> float:
        return (h**2 / (h**2 + variance)) ** (dims / 2) * math.exp(-square / (2 * (h**2 + variance)))

    return mean(2 * a**2) + mean(2 * b**2) - 2 * mean(a**2 + b**2, dims * shift**2)


@pytest.mark.parametrize("factors", [(1.0,), distances.MIXTURE])
def test_mmd_under_gaussian_kernels_is_the_closed_form(factors: tuple[float, ...]) -> None:
    a, b = normal(3000, 3), normal(3000, 3, 1) * 1.3 + 0.4
    blocks = [(a[i::6], b[i::6]) for i in range(6)]
    exact = float(np.mean([squared_mmd_of_gaussians(0.8 * factor, 3, 0.4, 1.0, 1.3) for factor in factors]))
    kernel = distances.gaussian_kernel(0.8, factors)
    found = distances.mmd(blocks, kernel)
    assert found.std_error is not None
    assert abs(found.value - exact) < 4 * found.std_error < 0.5 * exact
    bias = distances.mmd(blocks, kernel, biased=True).value - found.value
    widths = 0.8 * np.array(factors)
    same, other = (float(np.mean((widths**2 / (widths**2 + 2 * std**2)) ** 1.5)) for std in (1, 1.3))
    assert bias == pytest.approx((1 - same) / 500 + (1 - other) / 500, rel=0.05)


def test_mmd_under_a_linear_kernel_is_that_of_the_means_and_equal_sets_are_0_apart() -> None:
    a, b = normal(60, 4), normal(80, 4, 1) + 1
    apart = float((a.mean(0) - b.mean(0)).square().sum())
    assert distances.kernel_distance(a, b, distances.linear_kernel, biased=True) == pytest.approx(apart)
    for kernel in (distances.laplacian_kernel(1.0), distances.polynomial_kernel(2), distances.gaussian_kernel(0.5)):
        assert distances.kernel_distance(a, a, kernel, biased=True) == pytest.approx(0, abs=1e-9)
        assert distances.kernel_distance(a, b, kernel, biased=True) > 0


def test_kernels_are_scikit_learns() -> None:
    from sklearn.metrics import pairwise

    x, y = normal(20, 5), normal(30, 5, 1)
    named = {
        "rbf": (distances.gaussian_kernel(0.7), {"gamma": 1 / (2 * 0.7**2)}),
        "laplacian": (distances.laplacian_kernel(0.7), {"gamma": 1 / 0.7}),
        "polynomial": (distances.polynomial_kernel(4), {"degree": 4, "gamma": 1 / 5, "coef0": 1}),
        "linear": (distances.linear_kernel, {}),
    }
    for name, (kernel, options) in named.items():
        theirs = pairwise.pairwise_kernels(x.numpy(), y.numpy(), metric=name, **options)
        np.testing.assert_allclose(kernel(x, y).numpy(), theirs, rtol=1e-9)
    apart = pairwise.euclidean_distances(x)[np.triu_indices(20, 1)]
    assert distances.median_distance(x) == pytest.approx(np.median(apart), rel=0.02)


def test_relabelling_is_uniform_where_sets_are_alike_and_sees_where_they_are_not() -> None:
    kernel = distances.gaussian_kernel(1.0)
    found = [
        distances.permutation_p_value([(normal(20, 2, 2 * i), normal(20, 2, 2 * i + 1))], kernel, 99)
        for i in range(100)
    ]
    assert kstest(found, "uniform").pvalue > 0.01
    a, b = normal(120, 2), normal(120, 2, 1) + 0.8
    blocks = [(a[i::2], b[i::2]) for i in range(2)]
    for biased in (False, True):
        assert distances.permutation_p_value(blocks, kernel, 199, biased=biased) == 1 / 200
    # The statistic of the labels as they are is the estimate itself: with a and b swapped it stays the largest.
    assert distances.permutation_p_value([(b, a) for a, b in blocks], kernel, 199) == 1 / 200


def test_inception_score_is_torchmetrics_and_its_closed_forms() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * normal(300, 10).float()
    theirs = InceptionScore(feature=_Given(10), normalize=False, splits=1)
    theirs.features.append(logits)
    ours = distances.inception_score([distances.ClassSums.of(part) for part in logits.split(100)])
    assert ours.value == pytest.approx(float(theirs.compute()[0]), rel=1e-6)
    sure = 1000.0 * torch.eye(10).repeat(5, 1)
    assert distances.ClassSums.of(sure).score() == pytest.approx(10)  # sure of each class equally often
    assert distances.ClassSums.of(torch.zeros(20, 10)).score() == pytest.approx(1)


def test_inception_score_is_diversity_times_sharpness_each_with_its_closed_form() -> None:
    """ln IS = H(y) - E H(y | x): what is sure of one class alone is sharp and not diverse, what is unsure is neither
    sharp nor, as its classes are even, less diverse."""
    logits = torch.log(torch.eye(10) * 1e12 + 1)
    sure, alike = distances.ClassSums.of(logits), distances.ClassSums.of(logits[:1].expand(10, 10))
    unsure = distances.ClassSums.of(torch.zeros(20, 10))
    wanted = {"sure": (10, 1), "alike": (1, 1), "unsure": (10, 0.1)}
    for (diversity, sharpness), found in zip(wanted.values(), (sure, alike, unsure), strict=True):
        assert found.diversity() == pytest.approx(diversity, rel=1e-6)
        assert found.sharpness() == pytest.approx(sharpness, rel=1e-6)
    mixed = distances.ClassSums.of(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)))
    assert math.log(mixed.score()) == pytest.approx(math.log(mixed.diversity()) + math.log(mixed.sharpness()))


def test_precision_and_recall_see_what_is_missing() -> None:
    """Samples on half of the data's support: precise, with half the recall; the other way round the other way round."""
    data = torch.cat([normal(400, 2), normal(400, 2, 1) + 50])
    half = normal(400, 2, 2)
    precision, recall = distances.precision_recall(half, data)
    assert precision.value > 0.9
    assert recall.value == pytest.approx(0.5, abs=0.05)
    precision, recall = distances.precision_recall(data, half)
    assert precision.value == pytest.approx(0.5, abs=0.05)
    assert recall.value > 0.9
    with pytest.raises(UserError, match="more than 3"):
        distances.precision_recall(data, half[:3])


def test_nearest_neighbours_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK", 17)
    a, b = normal(50, 3), normal(60, 3, 1)
    found, numbers = distances.nearest(a, b, 2)
    exact, where = torch.cdist(a, b).topk(2, largest=False)
    assert torch.allclose(found, exact, atol=1e-7)
    assert torch.equal(numbers, where)
    own, _ = distances.nearest(a, a, 1, same=True)
    assert torch.allclose(own[:, 0], torch.cdist(a, a).fill_diagonal_(9).min(1).values, atol=1e-7)


def test_sliced_wasserstein_of_a_shift() -> None:
    """A shift by m moves the projection on v by v.m, whichever sizes the sets have."""
    lines = distances.directions(5, 64)
    x, m = normal(400, 5), torch.tensor([1.0, 0, -2, 0, 0.5]).double()
    exact = float((lines @ m).abs().mean())
    assert distances.sliced_wasserstein(x @ lines.T, (x + m) @ lines.T).value == pytest.approx(exact, rel=1e-9)
    double = torch.cat([x, x])
    assert distances.sliced_wasserstein(x @ lines.T, (double + m) @ lines.T).value == pytest.approx(exact, rel=1e-6)
    a, b = (x @ lines.T)[:170], torch.cat([(x + m) @ lines.T, (x @ lines.T)[:5]])  # some values are in both
    scipys = [wasserstein_distance(one, other) for one, other in zip(a.T.numpy(), b.T.numpy(), strict=True)]
    assert distances.sliced_wasserstein(a, b).value == pytest.approx(np.mean(scipys), rel=1e-12)


def test_fid_infinity_removes_the_bias_and_the_interval_holds() -> None:
    """64 dimensions, 1,600 samples: the distance of one distribution to itself is far above 0, its extrapolation is
    not."""
    exact = frechet.Reference.of(of_gaussian(torch.zeros(64).double(), torch.eye(64).double()))
    values, infinities, errors = [], [], []
    for seed in range(12):
        x = normal(1600, 64, 100 + seed)
        groups = []
        for part in x.split(200):
            groups.append(frechet.FeatureMoments.zero(torch.zeros(64)))
            groups[-1].add(part)
        found = frechet.estimate(exact, groups)
        assert [n for n, _ in found.points] == [1600, 800, 400, 200]
        values.append(found.value)
        infinities.append(found.infinity)
        errors.append(found.std_error)
    assert np.mean(values) > 0.5
    assert abs(np.mean(infinities)) < 0.1 * np.mean(values)
    assert 0.4 < np.mean(errors) / np.std(values) < 2.5


def test_moments_add_up_whatever_the_centre() -> None:
    x = 1000 + normal(300, 6)
    center = x[0].clone()
    parts = [frechet.FeatureMoments.zero(center) for _ in range(3)]
    for moments, rows in zip(parts, x.split(100), strict=True):
        moments.add(rows)
    together = parts[0] + parts[1] + parts[2]
    assert torch.allclose(together.covariance, x.T.cov(), atol=1e-9)
    assert torch.allclose((together - parts[1]).mean, torch.cat([x[:100], x[200:]]).mean(0))


def test_inception_is_torch_fidelitys() -> None:
    """Features and logits of weights drawn by number: sums recorded from torch-fidelity 0.4.0 with the same weights."""
    model = InceptionV3().eval()
    state = model.state_dict()
    for number, (name, value) in enumerate(sorted(state.items())):
        if value.dtype != torch.float32:
            continue
        drawn = noise.normal(7, torch.tensor([number]), tuple(value.shape), dtype=torch.float64)[0]
        if name.endswith("running_var"):
            value.copy_((0.1 * drawn).exp())
        elif name.endswith("bn.weight"):
            value.copy_(1 + 0.1 * drawn)
        else:
            value.copy_(0.1 * drawn if value.ndim == 1 else drawn * (2 / value[0].numel()) ** 0.5)
    images = (noise.uniform(8, torch.arange(2), (3, 32, 40)) * 256).to(torch.uint8)
    with torch.no_grad():
        features, logits = model(images)
    assert features.shape == (2, 2048)
    assert features.double().square().sum().item() == pytest.approx(6537.088124014561, rel=1e-4)
    assert logits.double().square().sum().item() == pytest.approx(6721.854781147448, rel=1e-4)
    assert features[0, :4].tolist() == pytest.approx([3.742723, 1.556191, 1.610705, 0.003459], abs=1e-4)


class _Given(torch.nn.Module):
    """An extractor that hands out what it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski 2018, eq. 4, pair by pair."""
    aa, bb = _kernel(a, a), _kernel(b, b)
    np.fill_diagonal(aa, 0)
    np.fill_diagonal(bb, 0)
    n, m = len(a), len(b)
    return float(aa.sum() / (n * (n - 1)) + bb.sum() / (m * (m - 1)) - 2 * _kernel(a, b).mean())


def _biased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    return float(_kernel(a, a).mean() + _kernel(b, b).mean() - 2 * _kernel(a, b).mean())
