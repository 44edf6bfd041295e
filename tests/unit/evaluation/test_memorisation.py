import pytest
import torch

from darkroom.errors import InputError
from darkroom.evaluation.memorisation import ClosestPair, measure_memorisation


def features(n, seed, dimensions=8):
    return torch.randn((n, dimensions), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TRAINING, HELD_OUT, FRESH = features(2000, 0), features(4000, 1), features(4000, 2)


def test_copies_of_training_images_are_all_found():
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(3))
    record, pairs = measure_memorisation(TRAINING[order], TRAINING, HELD_OUT, 5)
    assert record.near_copies == 1.0
    assert record.median_ratio == 0.0
    assert record.num_neighbours == 2000
    assert pairs == [ClosestPair(i, int(order[i]), 0.0) for i in range(5)]


def test_copies_with_a_little_noise_are_found_too():
    record, _ = measure_memorisation(TRAINING + 0.02 * features(2000, 4), TRAINING, HELD_OUT, 0)
    assert record.near_copies == 1.0
    assert 0 < record.median_ratio < 0.1


def test_new_draws_from_the_same_distribution_have_one_percent():
    """4,000 held-out and 4,000 new images: a standard deviation of the share of 0.0022."""
    record, _ = measure_memorisation(FRESH, TRAINING, HELD_OUT, 0)
    assert record.near_copies == pytest.approx(0.01, abs=0.006)
    assert record.median_ratio == pytest.approx(1.0, abs=0.03)


def test_the_share_of_copies_in_a_mixture_is_found():
    mixture = torch.cat((TRAINING[:1200], FRESH[:2800]))
    record, _ = measure_memorisation(mixture, TRAINING, HELD_OUT, 0)
    assert record.near_copies == pytest.approx(0.3 + 0.7 * 0.01, abs=0.006)


def test_the_threshold_is_the_distance_of_the_nearest_percent_of_held_out_images():
    line = torch.arange(101, dtype=torch.float64)[:, None] / 100
    training = torch.zeros((3, 1), dtype=torch.float64)
    record, _ = measure_memorisation(torch.tensor([[0.5], [2.0]]).double(), training, 1 + line, 0)
    assert record.threshold == pytest.approx(1.01)
    assert (record.near_copies, record.num_neighbours) == (0.5, 3)
    assert record.median_ratio == pytest.approx(1.25 / 1.5)


def test_held_out_images_that_are_in_the_training_set_do_not_hide_copies():
    """A fifth of the held-out images leaked; features of one image differ a little from batch to batch."""
    leaked = TRAINING[:1000] * (1 + 1e-7)
    clean, _ = measure_memorisation(TRAINING, TRAINING, HELD_OUT, 0)
    record, _ = measure_memorisation(TRAINING, TRAINING, torch.cat((HELD_OUT, leaked)), 0)
    assert record == clean


def test_held_out_images_that_all_leaked_are_refused():
    for held_out in (TRAINING[:50], TRAINING[:1]):
        with pytest.raises(InputError, match=f"held-out images: all {len(held_out)} have the features of a training"):
            measure_memorisation(FRESH, TRAINING, held_out, 0)


def test_the_closest_pairs_come_nearest_first_and_name_both_images():
    near = TRAINING[[70, 30, 50]] + torch.tensor([[3e-3], [1e-3], [2e-3]]).double()
    samples = torch.cat((FRESH[:10], near))
    _, pairs = measure_memorisation(samples, TRAINING, HELD_OUT, 3)
    assert [(pair.sample, pair.training) for pair in pairs] == [(11, 30), (12, 50), (10, 70)]
    assert [pair.distance for pair in pairs] == pytest.approx([8**0.5 * d for d in (1e-3, 2e-3, 3e-3)], rel=1e-6)
    _, every = measure_memorisation(samples, TRAINING, HELD_OUT, 100)
    assert len(every) == 13
    assert [pair.distance for pair in every] == sorted(pair.distance for pair in every)


def test_nothing_to_compare_is_refused():
    for sets in ((FRESH[:0], TRAINING, HELD_OUT), (FRESH, TRAINING[:0], HELD_OUT), (FRESH, TRAINING, HELD_OUT[:0])):
        with pytest.raises(ValueError, match="at least one each"):
            measure_memorisation(*sets, 1)
    with pytest.raises(ValueError, match="not all finite"):
        measure_memorisation(FRESH * float("nan"), TRAINING, HELD_OUT, 1)
