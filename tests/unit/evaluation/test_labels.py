"""Which labels are drawn: a perfect model of imbalanced data gets the FID of a perfect model."""

import pytest
import torch

from darkroom.evaluation.distances import Moments, frechet_distance
from darkroom.evaluation.labels import balanced_labels, stratified_labels, stratified_subset

COUNTS = [500, 400, 300, 250, 200, 180, 150, 130, 110, 100]  # 5 to 1


def test_balanced_labels_differ_by_one_at_most():
    counts = torch.bincount(balanced_labels(1797, 10))
    assert counts.sum() == 1797
    assert counts.max() - counts.min() <= 1


def test_stratified_labels_have_the_largest_remainders():
    labels = stratified_labels(101, [2, 1, 1])
    assert torch.bincount(labels).tolist() == [51, 25, 25]  # quotas 50.5, 25.25, 25.25
    counts = torch.bincount(stratified_labels(1797, COUNTS))
    assert counts.sum() == 1797
    assert ((counts - 1797 * torch.tensor(COUNTS) / sum(COUNTS)).abs() < 1).all()


def test_equal_shares_are_the_balanced_labels():
    assert torch.equal(stratified_labels(1797, [140] * 10), balanced_labels(1797, 10))
    assert stratified_labels(5, [1797]).tolist() == [0] * 5


def test_every_class_of_the_reference_is_drawn_and_no_other():
    counts = torch.bincount(stratified_labels(20, [10_000, 1, 0, 1]), minlength=4)
    assert counts.tolist() == [18, 1, 0, 1]


def test_each_class_is_spread_evenly():
    labels = stratified_labels(1000, COUNTS)
    for part in labels.split(250):
        assert (torch.bincount(part, minlength=10) - torch.bincount(labels) / 4).abs().max() <= 1


@pytest.mark.parametrize(("num_images", "counts"), [(1, [1, 1]), (5, [0, 0]), (5, [3, -1])])
def test_labels_that_cannot_be_are_refused(num_images, counts):
    with pytest.raises(ValueError, match="at least one image for each"):
        stratified_labels(num_images, counts)


def real(labels, generator):
    """Features of real images of these classes, whose means lie far apart."""
    means = 3 * torch.randn((10, 16), generator=torch.Generator().manual_seed(0))
    return means[labels] + torch.randn((len(labels), 16), generator=generator)


@pytest.mark.parametrize("ratio", [1.5, 2, 3, 5])
def test_a_perfect_model_of_imbalanced_data_has_the_fid_of_one_of_balanced_data(ratio):
    """Real images, redrawn: within 20 %. By balanced labels it was several times as high."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.linspace(300 * ratio, 300, 10).round().long()
    total, num_images = int(counts.sum()), 1797
    even = Moments.of(real(torch.arange(total) % 10, generator))
    skewed = Moments.of(real(torch.arange(10).repeat_interleave(counts), generator))

    def fid(reference, labels):
        drawn = [frechet_distance(reference, Moments.of(real(labels, generator))) for _ in range(8)]
        return sum(drawn) / len(drawn)

    balanced = fid(even, balanced_labels(num_images, 10))
    assert fid(skewed, stratified_labels(num_images, counts.tolist())) == pytest.approx(balanced, rel=0.2)
    assert fid(skewed, balanced_labels(num_images, 10)) > 2 * balanced


def test_a_held_out_split_with_the_same_shares_counts_whole():
    labels = torch.arange(10).repeat_interleave(torch.tensor(COUNTS) // 5)
    assert torch.equal(stratified_subset(labels, COUNTS, 0), torch.arange(len(labels)))
    by_chance = torch.multinomial(torch.tensor(COUNTS).double(), 400, True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stratified_subset(by_chance, COUNTS, 0), torch.arange(400))


def test_of_one_with_other_shares_the_largest_part_that_has_them():
    labels = torch.arange(1000) % 10  # a balanced test split beside imbalanced training images
    chosen = stratified_subset(labels, COUNTS, 0)
    counts = torch.bincount(labels[chosen])
    assert counts.tolist() == [100 * count // 500 for count in COUNTS]
    assert torch.equal(chosen, chosen.unique())
    assert not torch.equal(chosen, stratified_subset(labels, COUNTS, 1))


def test_a_class_that_was_not_held_out_is_left_out_of_the_shares():
    labels = torch.arange(1000) % 2
    assert torch.bincount(labels[stratified_subset(labels, [200, 100, 100], 0)]).tolist() == [500, 250]


def test_a_part_too_small_to_measure_is_not_taken():
    labels = torch.tensor([0] * 50 + [1])
    assert len(stratified_subset(labels, [10, 90], 0)) == 51
    one_of_the_last = torch.cat((torch.arange(9000) % 9, torch.tensor([9])))
    assert len(stratified_subset(one_of_the_last, [900] * 10, 0)) == 9001, "ten images are no floor"
