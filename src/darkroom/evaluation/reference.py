"""The real images under an extractor: their features, the floor, and a scale that gives a distance a meaning."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from darkroom.errors import InputError
from darkroom.evaluation.distances import Moments, ReferenceDistance
from darkroom.evaluation.extraction import Features, extract
from darkroom.evaluation.features import Extractor, scale
from darkroom.evaluation.labels import stratified_subset
from darkroom.evaluation.protocol import Scale
from darkroom.evaluation.published import PublishedStatistics
from darkroom.evaluation.sharing import Sharing
from darkroom.files import digest_file, read_json, replacing, write_json
from darkroom.randomness import Purpose, normal, permutation, uniform

FEATURES_FILE = "features.safetensors"
STATISTICS_FILE = "reference.json"


class Statistics(BaseModel):
    """`reference.json`. The floor is what real images that were held out get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features_digest: str  # sha256 of features.safetensors
    data_digest: str
    num_images: int  # of the training split
    class_counts: list[int]  # of it, for each label; without classes one count of all
    published_statistics: str | None  # sha256 of the file whose mean and covariance stand for the reference in FID
    floor_num_images: int
    floor_fid: float
    floor_class_accuracy: float | None = None  # absent without classes
    floor_class_accuracies: list[float] | None = None
    scale: Scale

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Raises InputError if the file is missing or damaged."""
        path = directory / STATISTICS_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such file; `dvc repro reference` makes it")
        try:
            return cls.model_validate(read_json(path))
        except (ValueError, ValidationError) as error:
            raise InputError(f"{path}: {error}; `dvc repro reference` makes it anew") from None


@dataclass(frozen=True)
class Reference:
    """What the reference stage left about the real images."""

    statistics: Statistics
    moments: Moments  # of all images of the training split, or published ones
    features: Tensor  # float32 (N, F) of training images: all, or the first `max_features` of a permutation
    index: Tensor  # int64 (N,): which images of the training split these are
    held_out: Tensor  # float32 (M, F)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Raises InputError if a file is missing, damaged or not the other's."""
        features, found = directory / FEATURES_FILE, Statistics.read(directory)
        if not features.is_file():
            raise InputError(f"{features}: no such file; `dvc repro reference` makes it")
        if digest_file(features) != found.features_digest:
            raise InputError(f"{features}: its sha256 is not the one in {STATISTICS_FILE}")
        tensors = load_file(features)
        moments = Moments.from_statistics(tensors["mean"], tensors["covariance"], found.num_images)
        return cls(found, moments, tensors["reference"], tensors["index"], tensors["held_out"])

    def distance(self) -> ReferenceDistance:
        """FID from the moments, KID from the features."""
        return ReferenceDistance(self.features, self.moments)


def write_reference(
    directory: Path | None,
    extractor: Extractor,
    real: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    seed: int,
    *,
    max_features: int,
    published: PublishedStatistics | None = None,
    sharing: Sharing | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics | None:
    """Compute features, floor and scale of uint8 images (N, C, H, W) with labels int64 (N,), and write them.

    On several processes all have to call this; the first one writes to `directory`, the others have none. The scale is
    of the images whose features are kept. Where a data set's own test split has other class shares, the floor is of the
    part of it that has those of the training split. `progress` counts images.
    """
    images, labels = real
    chosen = permutation(seed, Purpose.SUBSET, 0, len(images))[:max_features].sort().values
    done = 0

    def measured(images: Tensor) -> Features | None:
        nonlocal done
        before, done = done, done + len(images)
        return extract(extractor, images, sharing, (lambda n: progress(before + n)) if progress else None)

    train, test = measured(images), measured(held_out[0])
    degraded = {name: measured(make()) for name, make in _degradations(images[chosen], labels[chosen], seed).items()}
    if directory is None or train is None or test is None:
        return None
    classes = extractor.card.classes
    class_counts = torch.bincount(labels, minlength=max(len(classes), 1)).tolist()
    comparable = stratified_subset(held_out[1], class_counts, seed)
    floor = test.of(comparable)
    moments = Moments.of(train.values) if published is None else _moments(published, extractor, len(images))
    tensors = {
        "reference": train.values[chosen].contiguous(),
        "index": chosen,
        "held_out": floor.values,
        "mean": moments.mean,
        "covariance": moments.covariance,
    }
    with replacing(directory / FEATURES_FILE) as temporary:
        save_file(tensors, temporary)
    distance = ReferenceDistance(tensors["reference"], moments)
    statistics = Statistics(
        features_digest=digest_file(directory / FEATURES_FILE),
        data_digest=extractor.card.data_digest,
        num_images=len(images),
        class_counts=class_counts,
        published_statistics=None if published is None else published.sha256,
        floor_num_images=len(comparable),
        floor_fid=distance.fid(floor.values),
        floor_class_accuracy=floor.accuracy(held_out[1][comparable]) if classes else None,
        floor_class_accuracies=test.class_accuracies(held_out[1], len(classes)) if classes else None,
        scale=Scale(**{name: distance.fid(found.values) for name, found in degraded.items() if found is not None}),
    )
    write_json(directory / STATISTICS_FILE, statistics.model_dump(mode="json"))
    return statistics


def _moments(published: PublishedStatistics, extractor: Extractor, nominal: int) -> Moments:
    if len(published.mean) != extractor.num_features:
        raise InputError(
            f"the published statistics have {len(published.mean)} dimensions, the extractor {extractor.num_features}:"
            " they are of another network"
        )
    return Moments.from_statistics(published.mean, published.covariance, nominal)


def _degradations(images: Tensor, labels: Tensor, seed: int) -> dict[str, Callable[[], Tensor]]:
    """For each name in Scale what makes such images, uint8, from real ones."""
    index, shape = torch.arange(len(images)), tuple(images.shape[1:])

    def with_noise(sd: float) -> Tensor:
        parts = [
            ((scale(images[part]) + sd * normal(seed, Purpose.SCALE_NOISE, part, shape) + 1) * 127.5)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            for part in torch.split(index, 512)
        ]
        return torch.cat(parts)

    def class_means() -> Tensor:
        means = torch.zeros((int(labels.max()) + 1, *shape), dtype=torch.uint8)
        for label in torch.unique(labels).tolist():
            means[label] = images[labels == label].float().mean(0).round().to(torch.uint8)
        return means[labels]

    def pure_noise() -> Tensor:
        parts = torch.split(index, 512)
        return torch.cat([(uniform(seed, Purpose.SCALE_NOISE, p, shape, 1) * 256).to(torch.uint8) for p in parts])

    return {
        "noise_0_1": lambda: with_noise(0.1),
        "noise_0_2": lambda: with_noise(0.2),
        "noise_0_4": lambda: with_noise(0.4),
        "class_means": class_means,
        "pure_noise": pure_noise,
    }
