import pytest
import torch

from darkroom.diffusion.schedules import cosine
from darkroom.training.batches import BatchSource, DataOrder

IMAGES = torch.randint(0, 256, (37, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(37) % 10


def source(**changes):
    settings = {
        "images": IMAGES,
        "labels": LABELS,
        "alpha_bar": cosine(1000).alpha_bar,
        "order": DataOrder(0, 37),
        "seed": 0,
        "label_dropout": 0.1,
        "null_class": 10,
        "horizontal_flip": False,
    }
    return BatchSource(**(settings | changes))


@pytest.mark.parametrize("split", [1, 3, 16])
def test_a_batch_is_the_same_however_it_is_split(split):
    whole = source(horizontal_flip=True)(1000, 48)
    parts = [source(horizontal_flip=True)(1000 + first, split) for first in range(0, 48, split)]
    for name in ("x_t", "t", "labels", "eps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_every_epoch_shows_every_image_once():
    order = DataOrder(5, 37)
    for epoch in range(3):
        seen = order(torch.arange(epoch * 37, (epoch + 1) * 37))
        assert torch.equal(seen.sort().values, torch.arange(37))


def test_a_batch_may_cross_epochs_and_order_needs_no_history():
    crossing = DataOrder(5, 37)(torch.arange(30, 120))
    one_by_one = torch.cat([DataOrder(5, 37)(torch.tensor([g])) for g in range(30, 120)])
    assert torch.equal(crossing, one_by_one)


def test_noise_is_recoverable_from_the_batch():
    batch = source(label_dropout=0.0)(0, 37)
    a = cosine(1000).alpha_bar[batch.t].reshape(-1, 1, 1, 1)
    x_0 = (batch.x_t - (1 - a).sqrt() * batch.eps) / a.sqrt()
    images = IMAGES[DataOrder(0, 37)(torch.arange(37))]
    clear = batch.t < 900  # beyond, float32 noise hides the image
    assert torch.allclose(((x_0 + 1) * 127.5)[clear].float(), images[clear].float(), atol=0.05)
    assert torch.equal(batch.labels, LABELS[DataOrder(0, 37)(torch.arange(37))])


def test_a_tenth_of_the_labels_is_dropped():
    labels = source()(0, 20_000).labels
    assert abs(float((labels == 10).float().mean()) - 0.1) < 0.01


def test_half_of_the_images_is_flipped_and_only_when_asked():
    ramp = torch.arange(4, dtype=torch.uint8).repeat(37, 1, 4, 1).contiguous() * 60
    quiet = torch.full((1000,), 1 - 1e-12, dtype=torch.float64)  # no noise to speak of
    plain = source(images=ramp, alpha_bar=quiet)(0, 1000).x_t
    flipped = source(images=ramp, alpha_bar=quiet, horizontal_flip=True)(0, 1000).x_t
    assert bool((plain[:, 0, 0, 0] < plain[:, 0, 0, 3]).all())
    assert 0.4 < float((flipped[:, 0, 0, 0] > flipped[:, 0, 0, 3]).float().mean()) < 0.6
