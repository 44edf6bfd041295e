import math
import statistics

import numpy as np
import pytest
import scipy.stats
import torch

from darkroom.evaluation.distances import Moments, frechet_distance
from darkroom.evaluation.protocol import Estimate
from darkroom.evaluation.uncertainty import (
    _resamples,
    bootstrap_fid,
    fid_infinity,
    over_seeds,
    student_quantile,
)

DIMENSIONS, SHIFT, SCALE = 4, 0.3, 1.2
REFERENCE = Moments.from_statistics(torch.zeros(DIMENSIONS), torch.eye(DIMENSIONS), 50_000)
CLOSED_FORM = DIMENSIONS * (SHIFT**2 + (SCALE - 1) ** 2)


def draw(repetitions, n, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, n, DIMENSIONS)
    return SHIFT + SCALE * torch.randn(shape, dtype=torch.float64, generator=generator)


def alike(features):
    """Labels of a set without classes."""
    return torch.zeros(len(features), dtype=torch.int64)


def fids(sets):
    """FID of each set (R, n, F) from a standard normal distribution, by numpy: Σ₁ = I leaves tr Σ₂^½."""
    x = sets.numpy()
    mean = x.mean(1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh((x - mean).transpose(0, 2, 1) @ (x - mean) / (x.shape[1] - 1))
    return np.square(mean[:, 0]).sum(1) + np.square(np.sqrt(eigenvalues) - 1).sum(1)


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.9995])
def test_quantiles_of_student_are_scipys(probability):
    for degrees in (*range(1, 41), 199, 200, 5000):
        expected = scipy.stats.t.ppf(probability, degrees)
        assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (float("nan"), 3), (0.975, 0)])
def test_quantiles_that_do_not_exist_are_refused(probability, degrees):
    with pytest.raises(ValueError, match="expected a probability"):
        student_quantile(probability, degrees)


def test_the_estimate_over_seeds_is_scipys_interval():
    values = [3.1, 2.9, 3.4, 3.0, 2.7]
    found = over_seeds(values)
    interval = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert (found.value, found.spread) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.seeds == values


def test_one_seed_has_a_value_and_no_spread():
    assert over_seeds([2.5]) == Estimate(value=2.5, spread=None, low=None, high=None, seeds=[2.5])


def test_equal_seeds_have_no_spread():
    found = over_seeds([0.1, 0.1, 0.1])
    assert found == Estimate(value=0.1, spread=0.0, low=0.1, high=0.1, seeds=[0.1, 0.1, 0.1])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_seeds_without_a_finite_value_are_refused(values):
    with pytest.raises(ValueError, match="a finite value for each seed"):
        over_seeds(values)


def test_the_interval_over_five_seeds_covers_the_expected_fid_in_95_percent():
    """2,000 repetitions of five FIDs of 100 images: a standard deviation of the coverage of 0.5 %."""
    sets = draw(10_000, 100, 0)
    found = fids(sets)
    assert frechet_distance(REFERENCE, Moments.of(sets[0])) == pytest.approx(found[0], rel=1e-9)
    expected = found.mean()
    assert expected > CLOSED_FORM * 1.1  # it is FID at this n that is covered, its bias included
    estimates = [over_seeds(five) for five in found.reshape(2000, 5).tolist()]
    assert 0.93 <= statistics.fmean(one.low <= expected <= one.high for one in estimates) <= 0.97


def test_the_bootstrap_covers_the_expected_fid():
    """Between 90 and 98 % of the time: 300 repetitions alone make a standard deviation of 1.3 % around 94 %.

    For a generator that is nearly perfect, whose FID is mostly bias, the interval is too wide rather than too narrow.
    """
    expected = fids(draw(10_000, 100, 1)).mean()
    covered = []
    for number, features in enumerate(draw(300, 100, 2)):
        low, high = bootstrap_fid(REFERENCE, features, alike(features), 80, number)
        covered.append(low <= expected <= high)
    assert 0.90 <= statistics.fmean(covered) <= 0.98


def test_the_bootstrap_is_laid_around_the_fid_of_the_set_and_narrows_with_n():
    few, many = draw(1, 100, 3)[0], draw(1, 1600, 3)[0]
    widths = []
    for features in (few, many):
        low, high = bootstrap_fid(REFERENCE, features, alike(features), 200, 0)
        assert low < frechet_distance(REFERENCE, Moments.of(features)) < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(1600 / 100), rel=0.4)


def test_the_bootstrap_is_that_of_numpys_generator():
    """2,000 resamples on either side leave the ends of the interval uncertain by 2 % of its width."""
    features = draw(1, 150, 4)[0]
    resampled = fids(features[torch.from_numpy(np.random.default_rng(0).integers(0, 150, (2000, 150)))])
    centre = fids(features[None])[0] - resampled.mean()
    low, high = np.quantile(resampled, [0.025, 0.975]) + centre
    found = bootstrap_fid(REFERENCE, features, alike(features), 2000, 0)
    assert found == (pytest.approx(low, abs=0.06 * (high - low)), pytest.approx(high, abs=0.06 * (high - low)))


def test_the_bootstrap_takes_sets_with_a_singular_covariance():
    features = draw(1, 60, 5)[0]
    flat = torch.cat((features, features[:, :1], torch.zeros((60, 1))), 1)
    low, high = bootstrap_fid(Moments.of(flat + 0.1), flat, alike(flat), 50, 0)
    distance = frechet_distance(Moments.of(flat + 0.1), Moments.of(flat))
    assert math.isfinite(low)
    assert low - 1e-6 <= distance <= high + 1e-6


def test_the_bootstrap_depends_on_its_seed_alone():
    features = draw(1, 60, 5)[0]
    state = torch.random.get_rng_state()
    first, again, other = (bootstrap_fid(REFERENCE, features, alike(features), 40, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def classes_apart(repetitions, seed):
    """Sets of 100 images of two classes, 50 each, whose means lie far apart: (R, 100, 4), and their labels."""
    labels = torch.arange(100) % 2
    return draw(repetitions, 100, seed) + 4 * labels[:, None], labels


def test_balanced_classes_do_not_scatter_in_the_bootstrap():
    """Samples are drawn for as many labels of each class; the interval is that of such sets, and covers them."""
    sets, labels = classes_apart(5000, 8)
    expected, spread = fids(sets).mean(), fids(sets).std()
    covered, widths = [], []
    for number, features in enumerate(classes_apart(200, 9)[0]):
        low, high = bootstrap_fid(REFERENCE, features, labels, 100, number)
        covered.append(low <= expected <= high)
        widths.append(high - low)
    assert statistics.fmean(covered) >= 0.88  # 200 repetitions: 0.94 less more than three standard deviations
    assert statistics.fmean(widths) / (2 * 1.96) == pytest.approx(spread, rel=0.25)
    low, high = bootstrap_fid(REFERENCE, features, alike(features), 200, 0)
    assert high - low > 1.5 * statistics.fmean(widths), "without labels the shares of the classes scatter too"


def test_a_resample_has_as_many_of_each_label():
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 0, 2])
    for counts in _resamples(labels, 50, 0):
        assert torch.bincount(labels, weights=counts).tolist() == [3, 1, 4]


def test_the_parts_of_the_extrapolation_have_their_share_of_each_class():
    sets, labels = classes_apart(200, 10)
    found = [fid_infinity(REFERENCE, features, labels, seed) for seed, features in enumerate(sets)]
    variances = np.array([SCALE**2 + 4 * DIMENSIONS, *[SCALE**2] * (DIMENSIONS - 1)])  # of two means 4 apart
    closed_form = DIMENSIONS * (SHIFT + 2) ** 2 + np.square(np.sqrt(variances) - 1).sum()
    bias = fids(classes_apart(20_000, 12)[0]).mean() - closed_form
    left = statistics.fmean(found) - fids(sets).mean() + bias  # without what is unusual in these sets
    assert abs(left) < bias / 4


def test_an_interval_takes_more_than_one_resample():
    with pytest.raises(ValueError, match="at least 2 resamples, got 1"):
        bootstrap_fid(REFERENCE, draw(1, 60, 5)[0], torch.zeros(60), 1, 0)


def test_fid_infinity_is_far_nearer_the_closed_form_than_fid_is():
    sets = draw(60, 100, 6)
    extrapolated = [fid_infinity(REFERENCE, features, alike(features), seed) for seed, features in enumerate(sets)]
    bias = fids(draw(10_000, 100, 7)).mean() - CLOSED_FORM
    left = (
        statistics.fmean(extrapolated) - fids(sets).mean() + bias
    )  # of the bias, without what is unusual in these sets
    assert abs(left) < bias / 10


def test_fid_infinity_of_the_reference_distribution_is_about_zero():
    features = torch.randn((2000, DIMENSIONS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(fid_infinity(REFERENCE, features, alike(features), 0)) < frechet_distance(
        REFERENCE, Moments.of(features)
    )


def test_fid_infinity_depends_on_its_seed_alone():
    features = draw(1, 600, 5)[0]
    first, again, other = (fid_infinity(REFERENCE, features, alike(features), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first == pytest.approx(other, rel=0.2)


def test_fid_infinity_says_when_there_are_too_few_images():
    features = draw(1, 19, 5)[0]
    with pytest.warns(UserWarning, match="3 to 19 images at 4 dimensions"):
        fid_infinity(REFERENCE, features, alike(features), 0)
    with pytest.raises(ValueError, match="at least 10 images, got 9"):
        fid_infinity(REFERENCE, features[:9], torch.zeros(9), 0)
