from dataclasses import replace

import pytest
import torch

from darkroom.diffusion.schedules import cosine
from darkroom.randomness import Purpose, integers, uniform
from darkroom.training.batches import BatchSource, DataOrder, ResidentImages

IMAGES = torch.randint(0, 256, (37, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(37) % 10


def source(images=IMAGES, **changes):
    settings = {
        "images": ResidentImages(images, LABELS, DataOrder(0, 37)),
        "alpha_bar": cosine(1000).alpha_bar,
        "seed": 0,
        "prediction": "eps",
        "loss_weighting": "simple",
        "label_dropout": 0.1,
        "null_class": 10,
        "horizontal_flip": False,
    }
    return BatchSource(**(settings | changes))


@pytest.mark.parametrize("split", [1, 3, 16])
def test_a_batch_is_the_same_however_it_is_split(split):
    settings = {"horizontal_flip": True, "prediction": "v", "loss_weighting": "min_snr"}
    whole = source(**settings)(1000, 48)
    parts = [source(**settings)(1000 + first, split) for first in range(0, 48, split)]
    for name in ("x_t", "t", "labels", "target", "weight"):
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
    x_0 = (batch.x_t - (1 - a).sqrt() * batch.target) / a.sqrt()
    images = IMAGES[DataOrder(0, 37)(torch.arange(37))]
    clear = batch.t < 900  # beyond, float32 noise hides the image
    assert torch.allclose(((x_0 + 1) * 127.5)[clear].float(), images[clear].float(), atol=0.05)
    assert torch.equal(batch.labels, LABELS[DataOrder(0, 37)(torch.arange(37))])


def test_the_timestep_of_a_sample_is_drawn_by_its_global_index_alone():
    batch = source()(2_000, 300)
    for row, g in enumerate(range(2_000, 2_300)):
        assert int(batch.t[row]) == int(integers(0, Purpose.TIMESTEP, torch.tensor([g]), 1000))


def test_every_timestep_is_drawn_equally_often():
    t = source(alpha_bar=cosine(50).alpha_bar)(0, 20_000).t
    from scipy import stats  # a GPU host may be without

    assert stats.chisquare(torch.bincount(t, minlength=50).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_same_images_timesteps_and_noise_whatever_is_predicted(prediction, oracle):
    batch, plain = source(prediction=prediction)(0, 64), source()(0, 64)
    assert torch.equal(batch.x_t, plain.x_t)
    assert torch.equal(batch.t, plain.t)
    assert batch.weight is None
    x_0 = IMAGES[DataOrder(0, 37)(torch.arange(64))] / 127.5 - 1
    a = cosine(1000).alpha_bar[batch.t].reshape(-1, 1, 1, 1)
    expected = {"eps": plain.target, "x_0": x_0, "v": a.sqrt() * plain.target - (1 - a).sqrt() * x_0}[prediction]
    difference = float((batch.target - expected).abs().max())
    oracle(f"a batch's target, {prediction}", "its definition in float64", difference, 1e-6)


def test_min_snr_weights_belong_to_the_timesteps_of_the_batch(oracle):
    batch = source(loss_weighting="min_snr")(0, 64)
    difference = 0.0
    for weight, t in zip(batch.weight.tolist(), batch.t.tolist(), strict=True):
        snr = float(cosine(1000).snr[t])
        difference = max(difference, abs(weight - min(snr, 5.0) / snr))
    oracle("a batch's min-SNR weights, eps", "Hang 2023, one by one", difference, 1e-7)


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


def test_a_flipped_batch_is_the_batch_of_flipped_images():
    flipped = source(horizontal_flip=True)(0, 200)
    flip = uniform(0, Purpose.FLIP, torch.arange(200)) < 0.5
    plain, mirrored = source()(0, 200), source(images=IMAGES.flip(-1))(0, 200)
    expected = torch.where(flip[:, None, None, None], mirrored.x_t, plain.x_t)
    assert torch.equal(flipped.x_t, expected)
    assert torch.equal(flipped.target, plain.target)


@pytest.mark.gpu
def test_a_batch_is_made_without_waiting_for_the_gpu(gpu, never_waiting):
    images = ResidentImages(IMAGES.to(gpu), LABELS.to(gpu), DataOrder(0, 37))
    batches = source(horizontal_flip=True, loss_weighting="min_snr")
    batches = replace(batches, images=images, alpha_bar=batches.alpha_bar.to(gpu))
    first = batches(0, 8)  # kernels and pinned memory are set up
    with never_waiting():
        again = batches(0, 8)
    assert torch.equal(first.x_t, again.x_t)
