"""Which images are held out."""

import binascii
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darkroom.errors import InputError
from darkroom.philox import MASK, philox

_DATA_SPLIT = 8  # randomness.Purpose.DATA_SPLIT


def held_out(
    digests: ArrayLike, labels: ArrayLike, classes: Sequence[str], test_fraction: float, seed: int
) -> NDArray[np.bool_]:
    """True for the images of the test split: of each class `test_fraction`, rounded, at least one in either split.

    `digests` are the images' sha256 (hexadecimal), `labels` their classes. An image's rank is a random number that
    depends on (seed, its content) alone, and the images of a class with the lowest ranks are held out. So the split
    does not depend on names or order, adding images moves few others across, and copies of an image stay together: a
    copy in both splits would make the held-out figures look better than they are. Where copies straddle the cut, it
    moves to the nearest place between two different images.

    Raises InputError for a class that cannot be split: fewer than two different images.
    """
    names, owners = np.asarray(digests, dtype="S64"), np.asarray(labels)
    chosen = np.zeros(len(names), dtype=np.bool_)
    order = np.lexsort((names, _ranks(names, seed), owners))
    ends = np.searchsorted(owners[order], np.arange(len(classes)), side="right")
    start = 0
    for name, end in zip(classes, ends.tolist(), strict=True):
        members = order[start:end]
        cuts = np.flatnonzero(names[members[1:]] != names[members[:-1]]) + 1
        if not len(cuts):
            raise InputError(
                f"class {name}: {len(members)} decodable images, {min(len(members), 1)} of them different; "
                "expected at least 2, one for each split"
            )
        wanted = int(test_fraction * len(members) + 0.5)
        chosen[members[: cuts[np.argmin(np.abs(cuts - wanted))]]] = True
        start = end
    return chosen


def _ranks(digests: NDArray[np.bytes_], seed: int) -> NDArray[np.uint64]:
    """A random number of 64 bits per image, by (seed, the first 63 bits of its sha256)."""
    first = np.frombuffer(binascii.unhexlify(digests.tobytes()), dtype=">u8").reshape(len(digests), 4)[:, 0] >> 1
    index = first.astype(np.int64)
    # The same words as randomness.random_words(seed, Purpose.DATA_SPLIT, index, 2), without torch.
    zero, stream = np.zeros_like(index), np.full_like(index, _DATA_SPLIT << 16)
    counter = (zero, index & MASK, (index >> 32) & MASK, stream)
    with np.errstate(over="ignore"):
        high, low, *_ = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    ranks: NDArray[np.uint64] = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    return ranks
