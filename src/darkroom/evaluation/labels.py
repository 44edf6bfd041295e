"""Which labels evaluation images have: as many of each, or in the shares that the reference has."""

from collections.abc import Sequence

import torch
from torch import Tensor

from darkroom.randomness import Purpose, permutation

FEWEST = 200  # images, or half of them, that a subset of real ones holds at least


def balanced_labels(num_images: int, num_labels: int) -> Tensor:
    """0, 1, … num_labels - 1, 0, 1, …: int64 (num_images,); counts differ by one at most."""
    return torch.arange(num_images) % num_labels


def stratified_labels(num_images: int, class_counts: Sequence[int]) -> Tensor:
    """Labels in the shares of `class_counts`, each spread evenly over the indices: int64 (num_images,).

    FID compares distributions: against a reference with few images of a class, samples with as many as of the others
    are another distribution, and a perfect model scores badly. Counts are those of the largest remainders (Hamilton's
    method), and at least one of each class that the reference has. Raises ValueError if that is not possible.
    """
    counts, there = torch.tensor(class_counts), sum(count > 0 for count in class_counts)
    if not 0 < there <= num_images or counts.min() < 0:
        raise ValueError(f"expected at least one image for each of {there} classes, got {num_images}")
    quotas, total = counts * num_images, int(counts.sum())
    shares = quotas // total
    shares[(quotas % total).argsort(descending=True, stable=True)[: num_images - int(shares.sum())]] += 1
    for label in torch.nonzero((shares == 0) & (counts > 0)).flatten().tolist():
        shares[shares.argmax()] -= 1
        shares[label] = 1
    if torch.equal(shares, torch.bincount(balanced := balanced_labels(num_images, len(counts)), minlength=len(counts))):
        return balanced
    labels = torch.arange(len(counts)).repeat_interleave(shares)
    number = torch.arange(num_images) - (shares.cumsum(0) - shares)[labels]  # of each image within its class
    return labels[((number + 0.5).double() / shares[labels]).argsort(stable=True)]


def stratified_subset(labels: Tensor, class_counts: Sequence[int], seed: int) -> Tensor:
    """Which images, with `labels` int64 (N,), make the largest set in the shares of `class_counts`: int64 (M,), sorted.

    All of them if no class is off by more than chance explains (three standard deviations of its count), or if fewer
    than FEWEST or half of them would be left. Within a class `seed` chooses. Classes that are not among the labels are
    left out of the shares.
    """
    present = torch.bincount(labels, minlength=len(class_counts))
    shares = torch.tensor(class_counts).where(present > 0, 0).double()
    shares /= shares.sum()
    expected = len(labels) * shares
    if ((present - expected).abs() <= 1 + 3 * expected.sqrt()).all():
        return torch.arange(len(labels))
    there = shares > 0
    wanted = (shares * (present[there] / shares[there]).min()).floor().long()
    if wanted.sum() < min(FEWEST, len(labels) / 2):
        return torch.arange(len(labels))
    order = permutation(seed, Purpose.SUBSET, 0, len(labels))
    order = order[labels[order].argsort(stable=True)]  # by class, shuffled within one
    number = torch.arange(len(labels)) - (present.cumsum(0) - present)[labels[order]]
    return order[number < wanted[labels[order]]].sort().values
