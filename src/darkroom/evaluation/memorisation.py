"""Whether samples are copies of training images: distances to the nearest one, beside those of held-out real images.

Held-out images are as new to the training set as anything can be that comes from the same source. A sample that lies
nearer to a training image than all but the nearest 1 % of them is called a near-copy. A model that draws from the true
distribution makes 1 % of those, a model that copies makes more. Meehan 2020 (A non-parametric test to detect
data-copying in generative models) compares the same two sets of distances, by their ranks; Carlini 2023 (Extracting
training data from diffusion models) calls a sample extracted that is nearer to a training image than is usual.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from darkroom.errors import InputError
from darkroom.evaluation.neighbours import nearest
from darkroom.evaluation.protocol import Memorisation

NEAREST_HELD_OUT = 0.01  # share of held-out images that lie below the threshold
SAME = 1e-5  # of the largest distance: the features of an image differ by less when its batch is another one


class ClosestPair(NamedTuple):
    """A sample and the training image that it is nearest to."""

    sample: int
    training: int
    distance: float


def measure_memorisation(
    samples: Tensor, training: Tensor, held_out: Tensor, num_pairs: int
) -> tuple[Memorisation, list[ClosestPair]]:
    """Compare features of samples (S, F), training images (N, F) and held-out images (M, F).

    Returns the record and the `num_pairs` samples nearest to a training image, nearest first. Held-out images that are
    copies of a training image are leaks in the data and tell nothing about how near others come: they do not count.
    Raises InputError if all of them are copies, ValueError if a set is empty or not finite.
    """
    usual, _ = nearest(held_out, training)
    distances, index = nearest(samples, training)
    usual = usual[usual > SAME * usual.max()]
    if not len(usual):
        raise InputError(
            f"held-out images: all {len(held_out)} have the features of a training image, so near-copies cannot be told"
            " from new images; look for duplicates between the splits in reports/validation.html"
        )
    threshold = torch.quantile(usual, NEAREST_HELD_OUT)
    closest = distances.argsort(stable=True)[:num_pairs].tolist()
    record = Memorisation(
        near_copies=(distances < threshold).double().mean().item(),
        threshold=threshold.item(),
        median_ratio=(distances.quantile(0.5) / usual.quantile(0.5)).item(),
        num_neighbours=len(training),
    )
    return record, [ClosestPair(i, int(index[i]), float(distances[i])) for i in closest]
