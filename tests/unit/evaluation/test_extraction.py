"""Features: the same for an image on any number of processes."""

import pytest
import torch

from darkroom.evaluation.extraction import extract
from darkroom.evaluation.features import Extractor, ExtractorCard

CARD = ExtractorCard(
    kind="classifier",
    image_size=8,
    image_channels=1,
    classes=["a", "b", "c"],
    channels=[4, 8],
    features=6,
    held_out_accuracy=1.0,
    data_digest="d",
    classifier_digest="c",
)


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    found = Extractor(CARD, CARD.build())
    found.batch_size = 16
    return found


def images(n):
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


class OneOf:
    """A rank whose gathering is left to the test."""

    def __init__(self, rank, count):
        self.rank, self.count, self.gathered = rank, count, []

    def share(self, size):
        return slice(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def gather(self, share, size):
        self.gathered.append(share)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("n", [1, 16, 75])
def test_the_shares_of_ranks_make_up_the_whole_bit_for_bit(extractor, n, count):
    whole = extract(extractor, images(n))
    ranks = [OneOf(rank, count) for rank in range(count)]
    assert [extract(extractor, images(n), rank) for rank in ranks] == [None] * count
    values, predicted = (torch.cat([rank.gathered[kind] for rank in ranks]).flatten(0, 1)[:n] for kind in (0, 1))
    assert torch.equal(values, whole.values)
    assert torch.equal(predicted, whole.predicted)
    assert whole.values.shape == (n, 6)


def test_predictions_are_the_read_outs_largest(extractor):
    found = extract(extractor, images(40))
    logits = extractor.classifier(images(40).float() / 127.5 - 1)
    assert torch.equal(found.predicted, logits.argmax(1))
    labels = found.predicted.clone()
    labels[:10] = (labels[:10] + 1) % 3
    assert found.accuracy(labels) == 0.75
    by_class = found.class_accuracies(labels, 3)
    for label in range(3):
        mine = labels == label
        if mine.any():
            assert by_class[label] == pytest.approx((found.predicted[mine] == label).double().mean().item())


def test_a_class_without_images_has_no_accuracy(extractor):
    found = extract(extractor, images(5))
    assert torch.tensor(found.class_accuracies(torch.zeros(5, dtype=torch.int64), 3)).isnan().tolist()[1:] == [True] * 2


def test_progress_ends_at_the_number_of_images(extractor):
    seen: list[int] = []
    extract(extractor, images(75), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 75
