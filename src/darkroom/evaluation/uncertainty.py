"""How sure a score is: its spread over seeds, resampled images, and the limit of infinitely many images."""

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.evaluation.distances import Moments, frechet_distance
from darkroom.evaluation.protocol import Estimate
from darkroom.randomness import Purpose, permutation, random_words

LEVEL = 0.95  # of every interval
PARTS = 5  # into that many the images are cut at most, for the extrapolation
DRAWN = 32  # resamples whose random numbers are drawn at once


def over_seeds(values: Sequence[float]) -> Estimate:
    """The estimate from one value for each seed. Raises ValueError for none, or if one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"expected a finite value for each seed, got {list(values)}")
    value = statistics.mean(values)
    if len(values) == 1:
        return Estimate(value=value, spread=None, low=None, high=None, seeds=list(values))
    spread = statistics.stdev(values)
    half = student_quantile((1 + LEVEL) / 2, len(values) - 1) * spread / math.sqrt(len(values))
    return Estimate(value=value, spread=spread, low=value - half, high=value + half, seeds=list(values))


def student_quantile(probability: float, degrees: int) -> float:
    """What Student's t with `degrees` >= 1 degrees of freedom stays below with a probability in [0.5, 1)."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"expected a probability in [0.5, 1) and degrees >= 1, got {probability} and {degrees}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _student_central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _student_central(angle: float, degrees: int) -> float:
    """P(|t| < √degrees · tan(angle)), exact for whole degrees (Abramowitz & Stegun, eq. 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for j in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def bootstrap_fid(
    reference: Moments, features: Tensor, labels: Tensor, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % interval of what FID is on average at this number of images, from one set of features (N, F).

    Images are drawn from the set with replacement (Efron 1979), by `seed` alone: from those of each label int64 (N,) as
    many as there are, because samples are drawn for balanced labels. Otherwise the interval would be that of samples
    whose classes scatter, which on digits is five times as wide as the spread over seeds. The resamples hold fewer
    distinct images, which lifts their FID by about the bias that FID has anyway. So their mean is not the centre: their
    deviations from it are laid around the FID of the set.
    """
    if resamples < 2:
        raise ValueError(f"expected at least 2 resamples, got {resamples}")
    distance = _DistanceFrom(reference)
    found = [distance(Moments.of(features, counts)) for counts in _resamples(labels, resamples, seed)]
    resampled = torch.tensor(found, dtype=torch.float64)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = frechet_distance(reference, Moments.of(features)) + torch.quantile(resampled - resampled.mean(), tails)
    return low.item(), high.item()


def _resamples(labels: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each image was drawn, int64 (N,), for each resample: each takes the place of one of its own label."""
    order = labels.argsort(stable=True)  # images of a label are neighbours in it
    _, label, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    first_of_label = sizes.cumsum(0) - sizes
    first, size = first_of_label[label], sizes[label]
    images = torch.arange(len(labels))
    for start in range(0, resamples, DRAWN):
        words = random_words(seed, Purpose.BOOTSTRAP, images, min(DRAWN, resamples - start), step=start // DRAWN)
        for chosen in (first[:, None] + ((words * size[:, None]) >> 32)).T:
            yield torch.bincount(order[chosen], minlength=len(labels))


class _DistanceFrom:
    """`frechet_distance` from one reference, in the symmetric form: tr (Σ₁ Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½.

    With the root of the reference at hand a distance takes the eigenvalues of a symmetric matrix only, which at the
    hundreds of distances that a bootstrap takes saves most of the time.
    """

    def __init__(self, reference: Moments) -> None:
        covariance = reference.covariance
        values, vectors = torch.linalg.eigh(covariance)
        self._mean, self._trace = reference.mean, covariance.trace()
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, generated: Moments) -> float:
        covariance = generated.covariance
        squared = torch.linalg.eigvalsh(self._root @ covariance @ self._root).clamp(min=0)
        means = (self._mean - generated.mean).square().sum()
        distance: float = (means + self._trace + covariance.trace() - 2 * squared.sqrt().sum()).item()
        return distance


def fid_infinity(reference: Moments, features: Tensor, labels: Tensor, seed: int) -> float:
    """FID extrapolated to infinitely many images (Chong & Forsyth 2020): the intercept of a line in 1/n.

    The features (N, F) are shuffled by `seed` and dealt to k = 1 to 5 parts of N/k images, those of each label int64
    (N,) evenly; the line is fitted by least squares to the mean FID of the parts for each k. The paper draws subsets of
    15 sizes; parts hold every image once at every size, so that what is unusual about this set moves the line but
    hardly tilts it. Raises ValueError for fewer than 10 images; warns if the smallest parts have fewer images than
    dimensions, where the bias is no line.
    """
    n, num_features = features.shape
    if n < 2 * PARTS:
        raise ValueError(f"expected at least {2 * PARTS} images, got {n}")
    if n // PARTS < num_features:
        counts = f"{n // PARTS} to {n} images at {num_features} dimensions"
        warnings.warn(f"FID extrapolated from {counts}: its bias is not linear there", stacklevel=2)
    order = permutation(seed, Purpose.SUBSET, 0, n)
    order = order[labels[order].argsort(stable=True)].to(features.device)  # by label, shuffled within one
    inverse_sizes, distances = [], []
    for k in range(1, PARTS + 1):
        parts = [Moments.of(features[order[part::k]]) for part in range(k)]
        inverse_sizes.append(k / n)
        distances.append(statistics.fmean(frechet_distance(reference, part) for part in parts))
    return statistics.linear_regression(inverse_sizes, distances).intercept
