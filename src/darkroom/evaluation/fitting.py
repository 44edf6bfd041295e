"""Fitting the classifier whose features measure samples of this data set.

Without classes it learns to tell by how many quarter turns an image was turned, which takes knowing what is up in it
(Gidaris 2018, "Unsupervised representation learning by predicting image rotations").
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from darkroom.errors import StageFailed
from darkroom.evaluation.extraction import extract
from darkroom.evaluation.features import (
    CARD_FILE,
    INCEPTION_FILE,
    TURNS,
    WEIGHTS_FILE,
    Extractor,
    ExtractorCard,
    scale,
)
from darkroom.files import digest_file, replacing, write_json
from darkroom.nets.classifier import Classifier
from darkroom.nets.inception import InceptionV3, save_inception
from darkroom.params import ReferenceParams
from darkroom.randomness import Purpose, integers, permutation

WEIGHT_DECAY = 1e-2
MAX_SHIFT = 1  # pixels; shifted copies keep the features from fitting single training images


def fit_classifier(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor | None,
    params: ReferenceParams,
    progress: Callable[[int], None] | None = None,
) -> Classifier:
    """Train `classifier` on uint8 images (N, C, H, W) and labels int64 (N,); returns it in evaluation mode.

    It is trained where its weights are. Without labels it learns turns. Batches, shifts and turns are functions of
    (seed, global sample index).
    """
    device = next(classifier.parameters()).device
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=params.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, params.steps)
    order, epoch = permutation(params.seed, Purpose.REFERENCE_ORDER, 0, len(images)), 0
    classifier.train()
    for step in range(params.steps):
        samples = torch.arange(step * params.batch_size, (step + 1) * params.batch_size)
        chosen = []
        for sample in samples.tolist():
            if sample // len(images) != epoch:
                epoch = sample // len(images)
                order = permutation(params.seed, Purpose.REFERENCE_ORDER, epoch, len(images))
            chosen.append(int(order[sample % len(images)]))
        batch = shifted(scale(images[chosen]), samples, params.seed)
        batch, targets = turned(batch, samples, params.seed) if labels is None else (batch, labels[chosen])
        loss = F.cross_entropy(classifier(batch.to(device)), targets.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1)
    return classifier.eval()


def shifted(x: Tensor, samples: Tensor, seed: int) -> Tensor:
    """Shift each image of x (N, C, H, W) by up to one pixel each way; the border continues the edge."""
    n, _, height, width = x.shape
    span = 2 * MAX_SHIFT + 1
    move = integers(seed, Purpose.REFERENCE_SHIFT, samples, span * span)
    rows = (move // span)[:, None] + torch.arange(height) - MAX_SHIFT
    columns = (move % span)[:, None] + torch.arange(width) - MAX_SHIFT
    image = torch.arange(n)[:, None, None]
    moved = x.movedim(1, -1)[image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return moved.movedim(-1, 1)


def turned(x: Tensor, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Turn each image of x (N, C, H, H) by 0 to 3 quarter turns, drawn for its sample; also the numbers, int64 (N,)."""
    turns = integers(seed, Purpose.REFERENCE_TURN, samples, TURNS)
    images = x.clone()
    for number in range(1, TURNS):
        images[turns == number] = x[turns == number].rot90(number, (2, 3))
    return images, turns


def fit_extractor(
    directory: Path,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    classes: list[str],
    data_digest: str,
    params: ReferenceParams,
    *,
    inception: tuple[InceptionV3, str] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Extractor:
    """Fit on `train`, check on `held_out`, write to `directory`. Raises StageFailed below `params.min_accuracy`.

    `train` and `held_out` are uint8 images (N, C, H, W) and labels int64 (N,). Without `classes` the labels do not
    matter: fitted and checked is how well the classifier tells by how many quarter turns an image was turned. With
    `inception`, the network and the sha256 of the file it came from, its features count, and the classifier judges
    classes alone.
    """
    images, labels = train
    card = new_card(params, images, classes, data_digest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        classifier = card.build().to(device)
    fit_classifier(classifier, images, labels if classes else None, params, progress)
    check = held_out if classes else turned(held_out[0], torch.arange(len(held_out[0])), params.seed)
    accuracy = _accuracy(Extractor(card, classifier), *check)
    if accuracy < params.min_accuracy:
        what = "images" if classes else "images' quarter turns"
        raise StageFailed(
            f"the reference classifier gets {accuracy:.4f} of the held-out {what} right, reference.min_accuracy ="
            f" {params.min_accuracy}: scores would mean nothing; try more reference.steps or channels"
        )
    with replacing(directory / WEIGHTS_FILE) as temporary:
        save_file(classifier.state_dict(), temporary)
    digests = {"classifier_digest": digest_file(directory / WEIGHTS_FILE)}
    network = None
    if inception is not None:
        network, digests["inception_source"] = inception
        save_inception(network, directory / INCEPTION_FILE)
        digests["inception_digest"] = digest_file(directory / INCEPTION_FILE)
    card = card.model_copy(update={"held_out_accuracy": accuracy, **digests})
    write_json(directory / CARD_FILE, card.model_dump())
    return Extractor(card, classifier, network).to(device)


def new_card(params: ReferenceParams, images: Tensor, classes: list[str], data_digest: str) -> ExtractorCard:
    """The card of an extractor that is still to be fitted to uint8 `images` (N, C, H, W)."""
    return ExtractorCard(
        kind=params.extractor,
        image_size=images.shape[2],
        image_channels=images.shape[1],
        classes=classes,
        channels=params.channels,
        features=params.features,
        held_out_accuracy=0.0,
        data_digest=data_digest,
        classifier_digest="",
    )


def _accuracy(extractor: Extractor, images: Tensor, labels: Tensor) -> float:
    found = extract(extractor, images)
    assert found is not None  # there is one process
    return found.accuracy(labels)
