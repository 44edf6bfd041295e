"""Images that look the same and are not the same file: near-duplicates by their perceptual hashes."""

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 64  # that a hash is compared with, in each of four orders
_BITS, _TURNS = 64, 4
_BLOCK = 1 << 14  # hashes compared at once: they and their neighbours stay in the processor's cache


def near_duplicates(
    hashes: NDArray[np.uint64], images: NDArray[np.int64], usable: NDArray[np.bool_], max_bits: int
) -> NDArray[np.int64]:
    """For every row the row of its nearest near-duplicate, or -1; int64 (N,).

    `hashes` (N,) are perceptual hashes, `images` (N,) say which file it is: equal for exact copies, which are not
    near-duplicates of each other; negative when unknown. Rows that are not `usable`, and hashes of 0, which say
    nothing, are left out.

    Hashes that differ in at most `max_bits` bits are near. Comparing all pairs is out of the question, so the hashes
    are sorted four times, each time turned by 16 bits, and compared with the 64 that follow in that order. Two hashes
    that differ in up to 3 bits agree on one of the four leading 16 bits at least; they are missed only where more
    than 64 others stand between them. With more bits some pairs are missed.
    """
    partners = np.full(len(hashes), -1, dtype=np.int64)
    rows = np.flatnonzero(usable & (hashes != 0) & (images >= 0))
    if not len(rows):
        return partners
    _, first, copies = np.unique(images[rows], return_index=True, return_inverse=True)
    originals = rows[first]  # one row per file
    found = _nearest(hashes[originals], max_bits)
    near = np.where(found >= 0, originals[found], -1)
    partners[rows] = near[copies]
    return partners


def _nearest(hashes: NDArray[np.uint64], max_bits: int) -> NDArray[np.int64]:
    """For every hash the position of its nearest other within `max_bits` bits, or -1."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(order)])
    # Equal hashes are the nearest there can be: each takes the first of its group, the first takes the second.
    partners = np.full(len(hashes), -1, dtype=np.int64)
    grouped = np.repeat(sizes > 1, sizes)
    leaders = np.repeat(order[starts], sizes)
    partners[order[grouped]] = leaders[grouped]
    shared = starts[sizes > 1]
    partners[order[shared]] = order[shared + 1]
    if max_bits > 0:
        unique = order[starts]
        other = _nearest_unique(hashes[unique], max_bits)
        alone = (sizes == 1) & (other >= 0)
        partners[unique[alone]] = unique[other[alone]]
    return partners


def _nearest_unique(hashes: NDArray[np.uint64], max_bits: int) -> NDArray[np.int64]:
    """The same for `hashes` that are all different."""
    partners = np.full(len(hashes), -1, dtype=np.int64)
    distances = np.full(len(hashes), max_bits + 1, dtype=np.uint8)
    for turn in range(_TURNS):
        shift = turn * _BITS // _TURNS
        turned = (hashes << np.uint64(shift)) | (hashes >> np.uint64(_BITS - shift)) if shift else hashes
        order = np.argsort(turned, kind="stable")
        ordered = turned[order]
        for start in range(0, len(ordered), _BLOCK):
            block = ordered[start : start + _BLOCK + NEIGHBOURS]
            for offset in range(1, min(NEIGHBOURS, len(block) - 1) + 1):
                own = block[: min(_BLOCK, len(block) - offset)]
                bits = np.bitwise_count(own ^ block[offset : offset + len(own)])
                hits = np.flatnonzero(bits <= max_bits)
                if not len(hits):
                    continue
                low, high = order[start + hits], order[start + hits + offset]
                for one, other in ((low, high), (high, low)):
                    better = bits[hits] < distances[one]
                    distances[one[better]] = bits[hits][better]
                    partners[one[better]] = other[better]
    return partners
