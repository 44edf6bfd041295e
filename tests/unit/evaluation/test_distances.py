import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from darkroom.evaluation import distances
from darkroom.evaluation.distances import Moments, ReferenceDistance, frechet_distance
from darkroom.randomness import Purpose, normal


def gaussian(n, mean, sd, seed, dimensions=8):
    generator = torch.Generator().manual_seed(seed)
    return mean + sd * torch.randn((n, dimensions), dtype=torch.float64, generator=generator)


def scipy_fid(a, b):
    a, b = a.numpy(), b.numpy()
    product = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * product.real)


def test_fid_is_scipys():
    mixing = torch.randn((8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    a, b = gaussian(500, 0.0, 1.0, 0) @ mixing, gaussian(300, 0.3, 1.4, 1) @ mixing.T
    assert ReferenceDistance(a).fid(b) == pytest.approx(scipy_fid(a, b), rel=1e-6)


def test_fid_is_the_closed_form_of_two_gaussians():
    """Covariances with the same axes: |μ₁ - μ₂|² + Σ (σ₁ - σ₂)² over the axes."""
    axes, _ = torch.linalg.qr(gaussian(16, 0.0, 1.0, 3, dimensions=16))
    sd = torch.linspace(0.1, 3.0, 16, dtype=torch.float64), torch.linspace(2.0, 0.5, 16, dtype=torch.float64)
    mean = gaussian(2, 1.0, 1.0, 4, dimensions=16)
    a, b = (Moments.from_statistics(mean[i], (axes * sd[i] ** 2) @ axes.T, 50_000 * (i + 1)) for i in (0, 1))
    exact = (mean[0] - mean[1]).square().sum() + (sd[0] - sd[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(exact.item(), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(exact.item(), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_fid_is_torch_fidelitys():
    """The value is torch-fidelity 0.4.0's, `fid_statistics_to_metric` of `fid_features_to_statistics` of both sets.

    It was read from these features in float64; from float32 ones it takes the mean in float32 and gives 18.5156646272.
    """

    def features(n, sd, mean, purpose):
        x = normal(0, purpose, torch.arange(n), (64,)).double()
        scales = sd * (1 + torch.arange(64, dtype=torch.float64) / 16)
        return (mean + scales * x + 0.5 * x.roll(1, 1)).float()

    a, b = features(2000, 1.0, 0.0, Purpose.SUBSET), features(1500, 1.1, 0.1, Purpose.BOOTSTRAP)
    assert ReferenceDistance(a).fid(b) == pytest.approx(18.5156643590758, rel=1e-6)


class Identity(torch.nn.Module):
    num_features = 8

    def forward(self, features):
        return features


def test_fid_from_moments_is_that_of_torchmetrics_given_the_features():
    a, b = gaussian(500, 3.0, 1.0, 0), gaussian(300, 3.3, 1.4, 1)
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(metric.compute().item(), rel=1e-9)


def test_fid_of_fewer_images_than_dimensions_is_scipys():
    a, b = gaussian(40, 0.0, 1.0, 0), gaussian(6, 0.5, 1.0, 1)
    assert ReferenceDistance(a).fid(b) == pytest.approx(scipy_fid(a, b), rel=1e-6)


def test_moments_are_those_of_numpy_however_the_features_come(monkeypatch, tmp_path):
    monkeypatch.setattr(distances, "BLOCK", 7)
    monkeypatch.setattr(distances, "PANEL", 3)
    x = gaussian(50, 2.0, 1.5, 0).float()
    np.save(tmp_path / "features.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c"))
    batches = Moments(8)
    for part in (x[:1], x[1:1], x[1:20], x[20:]):
        batches.add(part)
    expected = x.double().numpy()
    for moments in (Moments.of(x), Moments.of(mapped), batches):
        assert moments.n == 50
        assert moments.sum.dtype == moments.outer.dtype == torch.float64
        np.testing.assert_allclose(moments.outer, expected.T @ expected, rtol=1e-12)
        np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(expected.T), rtol=1e-10, atol=1e-12)


def test_moments_hold_as_much_of_many_images_as_of_few():
    def held(n):
        moments = Moments.of(gaussian(n, 0.0, 1.0, 0))
        tensors = [value for value in vars(moments).values() if isinstance(value, torch.Tensor)]
        assert tensors
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert held(3) == held(30_000)


def test_counts_stand_for_repeated_images():
    x = gaussian(20, 1.0, 1.0, 0)
    counts = torch.tensor([0, 3, 1, 2] * 5)
    weighted, repeated = Moments.of(x, counts), Moments.of(x.repeat_interleave(counts, dim=0))
    assert weighted.n == repeated.n == 30
    np.testing.assert_allclose(weighted.sum, repeated.sum, rtol=1e-12)
    np.testing.assert_allclose(weighted.outer, repeated.outer, rtol=1e-12)


def test_published_statistics_stand_for_the_reference_in_fid_whatever_their_nominal_number():
    a, b = gaussian(400, 1.0, 1.0, 0), gaussian(300, 1.2, 1.1, 1)
    expected = ReferenceDistance(a).fid(b)
    for n in (2, 400, 50_000):
        statistics = Moments.from_statistics(a.mean(0), torch.cov(a.T), n)
        np.testing.assert_allclose(statistics.covariance, torch.cov(a.T), rtol=1e-9, atol=1e-12)
        assert frechet_distance(statistics, Moments.of(b)) == pytest.approx(expected, rel=1e-9)
    elsewhere = gaussian(400, 5.0, 1.0, 2)
    assert ReferenceDistance(elsewhere, statistics).fid(b) == pytest.approx(expected, rel=1e-9)
    assert ReferenceDistance(elsewhere, statistics).kid(b, 1, 300, 0) == ReferenceDistance(elsewhere).kid(b, 1, 300, 0)


@pytest.mark.parametrize(
    ("mean", "covariance", "n", "message"),
    [
        (torch.zeros(3), torch.eye(4), 9, r"got \(3,\) and \(4, 4\)"),
        (torch.zeros(3, 1), torch.eye(3), 9, "expected a mean"),
        (torch.zeros(3), torch.eye(3), 1, "at least 2 images, got 1"),
        (torch.tensor([0.0, float("nan"), 0.0]), torch.eye(3), 9, "not all finite"),
        (torch.zeros(3), torch.eye(3) / 0, 9, "not all finite"),
        (torch.zeros(3), torch.eye(3) + torch.eye(3).roll(1, 0), 9, "not symmetric"),
    ],
)
def test_statistics_that_cannot_be_are_refused(mean, covariance, n, message):
    with pytest.raises(ValueError, match=message):
        Moments.from_statistics(mean, covariance, n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_and_named_by_place(bad):
    x = gaussian(5000, 0.0, 1.0, 0)
    x[4500, 2] = bad
    with pytest.raises(ValueError, match="images 4096 to 4999 are not all finite"):
        Moments.of(x)


def test_sets_without_a_distance_are_refused():
    with pytest.raises(ValueError, match="8 and 4 dimensions"):
        frechet_distance(Moments.of(gaussian(9, 0.0, 1.0, 0)), Moments.of(gaussian(9, 0.0, 1.0, 0, dimensions=4)))
    for few in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 images on each side, got {few}"):
            frechet_distance(Moments.of(gaussian(9, 0.0, 1.0, 0)), Moments.of(gaussian(few, 0.0, 1.0, 0)))
    with pytest.raises(ValueError, match=r"expected features \(N, 8\), got \(9, 4\)"):
        Moments(8).add(gaussian(9, 0.0, 1.0, 0, dimensions=4))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = Moments.of(gaussian(1, 0.0, 1.0, 0)).covariance


def test_one_reference_measures_many_sets_and_each_as_if_alone():
    reference = gaussian(400, 0.0, 1.0, 0)
    distance, first, second = ReferenceDistance(reference), gaussian(300, 0.2, 1.0, 1), gaussian(350, 0.9, 1.0, 2)
    both = distance.fid(first), distance.fid(second)
    assert both == (ReferenceDistance(reference).fid(first), ReferenceDistance(reference).fid(second))
    assert distance.fid(reference) == pytest.approx(0.0, abs=1e-8)


def brute_force_kid(a, b):
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3, by loops."""
    m = len(a)

    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(a[i], b[j]) for i in range(m) for j in range(m)) / m**2
    return within - 2 * across


def test_kid_over_the_whole_set_is_the_brute_force_estimate():
    a, b = gaussian(30, 0.0, 1.0, 0), gaussian(30, 0.7, 1.0, 1)
    found = ReferenceDistance(a).kid(b, subsets=1, subset_size=30, seed=0)
    assert found.mean == pytest.approx(brute_force_kid(a, b), rel=1e-6)


def test_float32_features_are_measured_in_float64():
    a, b = gaussian(90, 30.0, 1.0, 0).float(), gaussian(90, 30.1, 1.0, 1).float()
    distance, exact = ReferenceDistance(a), ReferenceDistance(a.double())
    assert distance.fid(b) == exact.fid(b.double())
    assert distance.kid(b, 3, 50, 0) == exact.kid(b.double(), 3, 50, 0)


def test_kid_is_repeatable_by_its_seed_and_leaves_the_global_generator_alone():
    distance, b = ReferenceDistance(gaussian(200, 0.0, 1.0, 0)), gaussian(200, 0.2, 1.0, 1)
    state = torch.random.get_rng_state()
    first, again, other = (distance.kid(b, 10, 50, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_too_few_images_for_the_dimensions_warn():
    with pytest.warns(UserWarning, match="5 images at 8 dimensions"):
        ReferenceDistance(gaussian(5, 0.0, 1.0, 0))
