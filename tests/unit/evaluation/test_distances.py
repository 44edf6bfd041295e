import numpy as np
import pytest
import scipy.linalg
import torch

from darkroom.evaluation.distances import ReferenceDistance


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


def test_fid_approaches_the_closed_form_of_two_gaussians():
    found = ReferenceDistance(gaussian(200_000, 0.0, 1.0, 0)).fid(gaussian(200_000, 0.5, 2.0, 1))
    assert found == pytest.approx(8 * (0.5**2 + (2.0 - 1.0) ** 2), rel=0.02)


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


def test_kid_is_repeatable_by_its_seed_and_leaves_the_global_generator_alone():
    distance, b = ReferenceDistance(gaussian(200, 0.0, 1.0, 0)), gaussian(200, 0.2, 1.0, 1)
    state = torch.random.get_rng_state()
    first, again, other = (distance.kid(b, 10, 50, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_too_few_images_for_the_dimensions_warn():
    with pytest.warns(UserWarning, match="5 images at 8 dimensions"):
        ReferenceDistance(gaussian(5, 0.0, 1.0, 0))
