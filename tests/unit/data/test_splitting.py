"""The split: proportions by brute force, and what it must not depend on."""

import hashlib

import numpy as np
import pytest
import torch

from darkroom.data.splitting import _ranks, held_out
from darkroom.errors import InputError
from darkroom.randomness import Purpose, random_words


def digests(count: int, start: int = 0) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(start, start + count)]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 3, 10, 177])
def test_each_class_gives_its_rounded_share_and_at_least_one_to_either_split(fraction: float, count: int) -> None:
    labels = [0] * count + [1] * (2 * count)
    test = held_out(digests(3 * count), labels, ["a", "b"], fraction, seed=0)
    for label, size in ((0, count), (1, 2 * count)):
        found = sum(bool(t) for t, own in zip(test, labels, strict=True) if own == label)
        candidates = range(1, size)  # brute force: the permitted number nearest to the share
        nearest = min(abs(k - fraction * size) for k in candidates)
        assert abs(found - fraction * size) == pytest.approx(nearest)


def test_split_depends_on_content_and_seed_not_on_order() -> None:
    names = digests(200)
    first = held_out(names, [0] * 200, ["a"], 0.2, seed=0)
    backwards = held_out(names[::-1], [0] * 200, ["a"], 0.2, seed=0)
    assert (first == backwards[::-1]).all()
    other = held_out(names, [0] * 200, ["a"], 0.2, seed=1)
    assert (first != other).any()


def test_another_class_changes_nothing() -> None:
    names = digests(100)
    alone = held_out(names, [0] * 100, ["a"], 0.2, seed=3)
    both = held_out(names + digests(50, 100), [0] * 100 + [1] * 50, ["a", "b"], 0.2, seed=3)
    assert (alone == both[:100]).all()


def test_adding_images_moves_few_others() -> None:
    names = digests(1000)
    before = held_out(names, [0] * 1000, ["a"], 0.2, seed=0)
    after = held_out(names + digests(50, 1000), [0] * 1050, ["a"], 0.2, seed=0)[:1000]
    assert (before != after).sum() <= 25  # a new shuffle would move about 320


def test_copies_stay_on_one_side() -> None:
    names = [name for name in digests(40) for _ in range(3)]
    for seed in range(20):
        test = held_out(names, [0] * 120, ["a"], 0.2, seed)
        for i in range(0, 120, 3):
            assert test[i] == test[i + 1] == test[i + 2]
        assert abs(int(test.sum()) - 24) <= 1


@pytest.mark.parametrize("names", [digests(1), digests(1) * 5])
def test_class_that_cannot_be_split_is_named(names: list[str]) -> None:
    with pytest.raises(InputError, match=r"class lone: .* expected at least 2"):
        held_out(digests(4, 10) + names, [0] * 4 + [1] * len(names), ["many", "lone"], 0.2, seed=0)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_ranks_are_the_projects_random_words(seed: int) -> None:
    names = digests(500)
    index = torch.tensor([int(name[:16], 16) >> 1 for name in names])
    words = random_words(seed, Purpose.DATA_SPLIT, index, 2).tolist()
    assert _ranks(np.array(names, dtype="S64"), seed).tolist() == [(high << 32) | low for high, low in words]
