import math

import pytest
import torch
from scipy import stats

from darkroom.philox import philox
from darkroom.randomness import Purpose, integers, normal, permutation, random_words, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors of Philox publish with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_a_samples_numbers_do_not_depend_on_its_neighbours():
    index = torch.tensor([5, 17, 2**33 + 1, 0])
    together = normal(7, Purpose.TRAINING_NOISE, index, (3, 5, 5))
    for row, one in enumerate(index):
        assert torch.equal(together[row], normal(7, Purpose.TRAINING_NOISE, one[None], (3, 5, 5))[0])


def test_a_larger_shape_begins_with_the_numbers_of_a_smaller_one():
    index = torch.arange(3)
    assert torch.equal(random_words(1, Purpose.FLIP, index, 4), random_words(1, Purpose.FLIP, index, 9)[:, :4])


@pytest.mark.parametrize(
    ("seed", "purpose", "index", "step"),
    [(1, Purpose.FLIP, 4, 0), (0, Purpose.TIMESTEP, 4, 0), (0, Purpose.FLIP, 5, 0), (0, Purpose.FLIP, 4, 1)],
)
def test_seed_purpose_index_and_step_each_change_the_numbers(seed, purpose, index, step):
    base = random_words(0, Purpose.FLIP, torch.tensor([4]), 8)
    assert not torch.equal(base, random_words(seed, purpose, torch.tensor([index]), 8, step))


def test_uniform_and_normal_pass_kolmogorov_smirnov():
    index = torch.arange(20_000)
    u = uniform(3, Purpose.LABEL_DROP, index).numpy()
    z = normal(3, Purpose.INITIAL_NOISE, index, (5,)).double().flatten().numpy()
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_normal_numbers_of_neighbouring_samples_are_uncorrelated():
    z = normal(0, Purpose.INITIAL_NOISE, torch.arange(200), (500,)).double()
    correlation = torch.corrcoef(z)
    off_diagonal = correlation[~torch.eye(200, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 6 / math.sqrt(500)


def test_integers_are_uniform_over_their_range():
    drawn = integers(11, Purpose.TIMESTEP, torch.arange(100_000), 50)
    assert stats.chisquare(torch.bincount(drawn, minlength=50).numpy()).pvalue > 1e-3


def test_permutation_visits_every_image_once_and_differs_by_epoch():
    first, second = (permutation(0, Purpose.DATA_ORDER, epoch, 1000) for epoch in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert (first == second).float().mean() < 0.02


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**16)])
def test_seed_and_step_out_of_range_are_refused(seed, step):
    with pytest.raises(ValueError, match="expected a"):
        random_words(seed, Purpose.FLIP, torch.tensor([0]), 1, step)
