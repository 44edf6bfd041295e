"""Which images are held out."""

import numpy as np
from numpy.typing import NDArray

from darkroom.errors import InputError


def held_out(
    digests: list[str], labels: list[int], classes: list[str], test_fraction: float, seed: int
) -> NDArray[np.bool_]:
    """True for the images of the test split: of each class `test_fraction`, rounded, at least one in either split.

    `digests` are the images' sha256 (hexadecimal), `labels` their classes. An image's rank is a random number that
    depends on (seed, its content) alone, and the images of a class with the lowest ranks are held out. So the split
    does not depend on names or order, adding images moves few others across, and copies of an image stay together: a
    copy in both splits would make the held-out figures look better than they are. Where copies straddle the cut, it
    moves to the nearest place between two different images.

    Raises InputError for a class that cannot be split: fewer than two different images.
    """
    ranks = _ranks(digests, seed)
    chosen = np.zeros(len(digests), dtype=np.bool_)
    members: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        members[label].append(index)
    for name, indices in zip(classes, members, strict=True):
        order = sorted(indices, key=lambda index: (ranks[index], digests[index]))
        cuts = [k for k in range(1, len(order)) if digests[order[k]] != digests[order[k - 1]]]
        if not cuts:
            raise InputError(
                f"class {name}: {len(order)} decodable images, {min(len(order), 1)} of them different; "
                "expected at least 2, one for each split"
            )
        wanted = int(test_fraction * len(order) + 0.5)
        cut = min(cuts, key=lambda k: (abs(k - wanted), k))
        chosen[order[:cut]] = True
    return chosen


def _ranks(digests: list[str], seed: int) -> list[int]:
    """A random number of 64 bits per image, by (seed, the first 63 bits of its sha256)."""
    import torch

    from darkroom.randomness import Purpose, random_words

    index = torch.tensor([int(digest[:16], 16) >> 1 for digest in digests], dtype=torch.int64)
    words = random_words(seed, Purpose.DATA_SPLIT, index, 2).tolist()
    return [(high << 32) | low for high, low in words]
