import math
import statistics

import numpy as np
import pytest
import scipy.stats
import torch

from darkroom.evaluation.distances import Moments, frechet_distance
from darkroom.evaluation.protocol import Estimate
from darkroom.evaluation.uncertainty import fid_deviation, fid_infinity, over_seeds, student_quantile

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


def classes_apart(repetitions, seed):
    """Sets of 100 images of two classes, 50 each, whose means lie far apart: (R, 100, 4), and their labels."""
    labels = torch.arange(100) % 2
    return draw(repetitions, 100, seed) + 4 * labels[:, None], labels


# (dimensions, how far the model is off, images of a set, seeds): perfect models and poor ones, few images and many.
MODELS = [
    (16, 0.0, 300, 2),
    (64, 0.0, 300, 5),
    (64, 0.1, 300, 2),
    (16, 0.05, 600, 3),
    (64, 0.0, 600, 10),
    (32, 0.0, 1797, 2),
    (32, 0.1, 1797, 5),
]
NUM_CLASSES = 10


def distributions(dimensions, generator):
    """A maker of sets (n, F) of ten classes: `make(n, off)`, with 0 those of the reference."""
    means = 1.5 * torch.randn((NUM_CLASSES, dimensions), dtype=torch.float64, generator=generator)
    scales = torch.linspace(2, 0.3, dimensions, dtype=torch.float64)

    def make(n, off):
        noise = torch.randn((n, dimensions), dtype=torch.float64, generator=generator)
        return (means[torch.arange(n) % NUM_CLASSES] + noise * scales) * (1 + off) + 0.3 * off

    return make


def fid_of(reference):
    """FID by the symmetric form, of one set after the other: a tenth of torchmetrics' time."""
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = (vectors * values.sqrt()) @ vectors.T

    def distance(features):
        squared = torch.linalg.eigvalsh(root @ torch.cov(features.T) @ root).clamp(min=0)
        trace = features.var(0).sum() + reference.covariance.trace()
        return (trace - 2 * squared.sqrt().sum() + (features.mean(0) - reference.mean).square().sum()).item()

    return distance


@pytest.mark.parametrize(("dimensions", "off", "n", "seeds"), MODELS)
def test_the_deviation_is_that_of_sets_drawn_anew(dimensions, off, n, seeds):
    """300 sets tell the true deviation to 4 %, so 16 % contain the promised 10 % with three standard errors."""
    make = distributions(dimensions, torch.Generator().manual_seed(dimensions + n))
    reference = Moments.of(make(1438, 0.0))
    fid = fid_of(reference)
    true = statistics.stdev(fid(make(n, off)) for _ in range(300))
    labels = torch.arange(n) % NUM_CLASSES
    found = [fid_deviation(reference, [make(n, off) for _ in range(seeds)], labels) for _ in range(20)]
    assert math.sqrt(statistics.fmean(value**2 for value in found)) == pytest.approx(true, rel=0.16)
    assert statistics.stdev(found) < 0.25 * true


def test_a_bootstrap_would_give_a_perfect_model_half_as_much_again():
    """What the gate's margin came from before: 1.4 to 1.8 times the deviation."""
    make = distributions(16, torch.Generator().manual_seed(0))
    reference, labels = Moments.of(make(1438, 0.0)), torch.arange(300) % NUM_CLASSES
    fid, generator = fid_of(reference), torch.Generator().manual_seed(1)
    true = statistics.stdev(fid(make(300, 0.0)) for _ in range(300))
    resampled = []
    for _ in range(20):
        features = make(300, 0.0)
        of_a_class = torch.randint(30, (60, 300), generator=generator) * NUM_CLASSES + labels
        resampled.append(statistics.variance(fid(features[chosen]) for chosen in of_a_class))
    assert math.sqrt(statistics.fmean(resampled)) > 1.35 * true


def test_the_deviation_of_a_shifted_gaussian_is_the_linear_one():
    """Far from the reference FID is linear in the images: 2 d² Var / N of the squared distance from it."""
    n, shift = 4000, 3.0
    features = draw(1, n, 3)[0] / SCALE + shift
    linear = 2 * (shift + SHIFT / SCALE) * math.sqrt(DIMENSIONS) / math.sqrt(n)
    assert fid_deviation(REFERENCE, [features], alike(features)) == pytest.approx(linear, rel=0.05)


def test_the_deviation_takes_sets_with_a_singular_covariance():
    features = draw(1, 60, 5)[0]
    flat = torch.cat((features, features[:, :1], torch.zeros((60, 1))), 1)
    there = fid_deviation(Moments.of(flat + 0.1), [flat], alike(flat))
    assert there == pytest.approx(fid_deviation(Moments.of(features + 0.1), [features], alike(features)), rel=0.3)


def test_classes_apart_do_not_scatter_in_the_deviation():
    """Samples are drawn for given labels; without them the shares of the classes would scatter too."""
    sets, labels = classes_apart(5000, 8)
    found = [fid_deviation(REFERENCE, [features], labels) for features in classes_apart(60, 9)[0]]
    assert statistics.fmean(found) == pytest.approx(fids(sets).std(), rel=0.1)
    assert fid_deviation(REFERENCE, [sets[0]], alike(sets[0])) > 2 * found[0]


def test_labels_of_one_image_count_together():
    features = draw(1, 100, 11)[0]
    all_alike = fid_deviation(REFERENCE, [features], alike(features))
    each_its_own = fid_deviation(REFERENCE, [features], torch.arange(100))
    assert all_alike < each_its_own < 1.42 * all_alike, "not corrected, as halves of one image say nothing"
    one_alone = alike(features)
    one_alone[0] = 1
    assert fid_deviation(REFERENCE, [features], one_alone) == pytest.approx(all_alike, rel=0.1)


@pytest.mark.parametrize("of_each", [1, 2, 3, 4])
def test_a_few_images_of_each_label_never_make_the_deviation_too_small(of_each):
    generator = torch.Generator().manual_seed(of_each)
    means, labels = torch.randn((150, 8), dtype=torch.float64, generator=generator), torch.arange(150 * of_each) % 150

    def make(n, off=0.1):
        classes = torch.arange(n) % 150
        return (means[classes] + torch.randn((n, 8), dtype=torch.float64, generator=generator)) * (1 + off)

    reference = Moments.of(make(3000, 0.0))
    fid = fid_of(reference)
    true = statistics.stdev(fid(make(len(labels))) for _ in range(300))
    found = statistics.mean(fid_deviation(reference, [make(len(labels))], labels) for _ in range(20))
    assert 0.9 * true < found < 1.8 * true


@pytest.mark.parametrize("sets", [[], [torch.zeros((3, DIMENSIONS))], [torch.zeros((9, DIMENSIONS))]])
def test_a_deviation_takes_images_and_a_label_for_each(sets):
    with pytest.raises(ValueError, match="expected sets of at least 4 images"):
        fid_deviation(
            REFERENCE, sets, torch.zeros(8, dtype=torch.int64) if sets and len(sets[0]) > 4 else torch.zeros(3)
        )


def test_the_parts_of_the_extrapolation_have_their_share_of_each_class():
    sets, labels = classes_apart(200, 10)
    found = [fid_infinity(REFERENCE, features, labels, seed) for seed, features in enumerate(sets)]
    variances = np.array([SCALE**2 + 4 * DIMENSIONS, *[SCALE**2] * (DIMENSIONS - 1)])  # of two means 4 apart
    closed_form = DIMENSIONS * (SHIFT + 2) ** 2 + np.square(np.sqrt(variances) - 1).sum()
    bias = fids(classes_apart(20_000, 12)[0]).mean() - closed_form
    left = statistics.fmean(found) - fids(sets).mean() + bias  # without what is unusual in these sets
    assert abs(left) < bias / 4


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
