"""Near-duplicates: what a comparison of all pairs finds."""

import numpy as np
import pytest
from numpy.typing import NDArray

from darkroom.data.validation.duplicates import NEIGHBOURS, near_duplicates


def brute_force(
    hashes: NDArray[np.uint64], images: NDArray[np.int64], usable: NDArray[np.bool_], max_bits: int
) -> list[int]:
    """The distance of every row to its nearest near-duplicate, or -1."""
    nearest = []
    for i in range(len(hashes)):
        distances = [
            int(hashes[i] ^ hashes[j]).bit_count()
            for j in range(len(hashes))
            if usable[i] and usable[j] and images[i] != images[j] and hashes[i] and hashes[j]
        ]
        best = min(distances, default=65)
        nearest.append(best if best <= max_bits else -1)
    return nearest


def distances(hashes: NDArray[np.uint64], partners: NDArray[np.int64]) -> list[int]:
    return [int(hashes[i] ^ hashes[j]).bit_count() if j >= 0 else -1 for i, j in enumerate(partners)]


def hashes_with_relatives(count: int, generator: np.random.Generator) -> NDArray[np.uint64]:
    """Random hashes; half of them are others with up to 9 bits turned."""
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    for i in range(count // 2, count):
        hashes[i] = hashes[generator.integers(0, i)]
        for bit in generator.integers(0, 64, generator.integers(0, 10)):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    return hashes


@pytest.mark.parametrize("max_bits", [0, 1, 3])
def test_finds_the_nearest_of_all_pairs_up_to_three_bits(max_bits: int) -> None:
    generator = np.random.default_rng(max_bits)
    hashes = hashes_with_relatives(600, generator)
    images = np.where(generator.random(600) < 0.1, generator.integers(0, 600, 600), np.arange(600))  # some exact copies
    first = {image: hashes[i] for i, image in reversed(list(enumerate(images)))}
    hashes = np.array([first[image] for image in images], dtype=np.uint64)  # which have one hash
    usable = generator.random(600) < 0.9
    partners = near_duplicates(hashes, images, usable, max_bits)
    expected = brute_force(hashes, images, usable, max_bits)
    assert distances(hashes, partners) == expected
    assert max(expected) == max_bits
    found = partners >= 0
    assert not (images[found] == images[partners[found]]).any()


def test_finds_the_nearest_within_eight_bits_among_few() -> None:
    hashes = hashes_with_relatives(NEIGHBOURS + 1, np.random.default_rng(1))
    images, usable = np.arange(len(hashes)), np.ones(len(hashes), dtype=bool)
    partners = near_duplicates(hashes, images, usable, 8)
    assert distances(hashes, partners) == brute_force(hashes, images, usable, 8)


def test_more_equal_hashes_than_neighbours_all_have_a_partner() -> None:
    hashes = np.full(5 * NEIGHBOURS, 12345, dtype=np.uint64)
    partners = near_duplicates(hashes, np.arange(len(hashes)), np.ones(len(hashes), dtype=bool), 0)
    assert (partners >= 0).all()
    assert (partners != np.arange(len(hashes))).all()


def test_many_exact_copies_do_not_hide_a_near_duplicate() -> None:
    hashes = np.full(5 * NEIGHBOURS, 12345, dtype=np.uint64)
    images = np.zeros(len(hashes), dtype=np.int64)
    hashes[-1], images[-1] = 12344, 1
    usable = np.ones(len(hashes), dtype=bool)
    partners = near_duplicates(hashes, images, usable, 1)
    assert partners.tolist() == [len(hashes) - 1] * (len(hashes) - 1) + [0]
    assert near_duplicates(hashes, np.zeros_like(images), usable, 1).max() == -1


def test_what_says_nothing_is_left_out() -> None:
    hashes = np.array([0, 0, 5, 5, 5], dtype=np.uint64)
    images = np.array([0, 1, 2, 3, -1])
    usable = np.array([True, True, True, False, True])
    assert near_duplicates(hashes, images, usable, 8).tolist() == [-1] * 5
    assert near_duplicates(hashes[:0], images[:0], usable[:0], 3).shape == (0,)
