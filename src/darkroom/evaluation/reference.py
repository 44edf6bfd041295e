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
from darkroom.evaluation.distances import ReferenceDistance
from darkroom.evaluation.features import BATCH, Extractor, scale
from darkroom.files import digest_file, read_json, replacing, write_json
from darkroom.randomness import Purpose, normal, uniform

FEATURES_FILE = "features.safetensors"
STATISTICS_FILE = "reference.json"


class Scale(BaseModel):
    """FID of things whose quality anybody can imagine, so that a number means something."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    noise_0_1: float  # the reference images with Gaussian noise of this standard deviation, at a range of [-1, 1]
    noise_0_2: float
    noise_0_4: float
    class_means: float  # every image replaced by the mean of its class; without classes, of all images
    pure_noise: float  # uniform over all levels


class Statistics(BaseModel):
    """`reference.json`. The floor is what real images that were held out get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features_digest: str  # sha256 of features.safetensors
    num_images: int
    floor_num_images: int
    floor_fid: float
    floor_class_accuracy: float | None = None  # absent without classes
    scale: Scale


@dataclass(frozen=True)
class Reference:
    """What the reference stage left about the real images."""

    statistics: Statistics
    features: Tensor  # float64 (N, F) of the reference split
    held_out: Tensor  # float64 (M, F)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Raises InputError if a file is missing, damaged or not the other's."""
        features, statistics = directory / FEATURES_FILE, directory / STATISTICS_FILE
        for path in (features, statistics):
            if not path.is_file():
                raise InputError(f"{path}: no such file; `dvc repro reference` makes it")
        try:
            found = Statistics.model_validate(read_json(statistics))
        except (ValueError, ValidationError) as error:
            raise InputError(f"{statistics}: {error}") from None
        if digest_file(features) != found.features_digest:
            raise InputError(f"{features}: its sha256 is not the one in {STATISTICS_FILE}")
        tensors = load_file(features)
        return cls(found, tensors["reference"], tensors["held_out"])


def write_reference(
    directory: Path, extractor: Extractor, real: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int
) -> Statistics:
    """Compute features, floor and scale of uint8 images (N, C, H, W) with labels int64 (N,), and write them."""
    features = {"reference": extractor(real[0]), "held_out": extractor(held_out[0])}
    with replacing(directory / FEATURES_FILE) as temporary:
        save_file(features, temporary)
    distance = ReferenceDistance(features["reference"])
    statistics = Statistics(
        features_digest=digest_file(directory / FEATURES_FILE),
        num_images=len(real[0]),
        floor_num_images=len(held_out[0]),
        floor_fid=distance.fid(features["held_out"]),
        floor_class_accuracy=extractor.class_accuracy(*held_out),
        scale=_scale(distance, extractor, *real, seed),
    )
    write_json(directory / STATISTICS_FILE, statistics.model_dump(exclude_none=True))
    return statistics


def _scale(distance: ReferenceDistance, extractor: Extractor, images: Tensor, labels: Tensor, seed: int) -> Scale:
    shape = tuple(images.shape[1:])
    means = torch.zeros((int(labels.max()) + 1, *shape), dtype=torch.uint8)
    for label in torch.unique(labels).tolist():
        means[label] = images[labels == label].float().mean(0).round().to(torch.uint8)

    def fid(make: Callable[[Tensor], Tensor]) -> float:
        """FID of uint8 images that `make` gives for numbers of reference images (n,), a batch at a time."""
        batches = torch.split(torch.arange(len(images)), BATCH)
        return distance.fid(torch.cat([extractor(make(index)) for index in batches]))

    def with_noise(sd: float) -> float:
        def noisy(index: Tensor) -> Tensor:
            x = scale(images[index]) + sd * normal(seed, Purpose.SCALE_NOISE, index, shape)
            return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

        return fid(noisy)

    return Scale(
        noise_0_1=with_noise(0.1),
        noise_0_2=with_noise(0.2),
        noise_0_4=with_noise(0.4),
        class_means=fid(lambda index: means[labels[index]]),
        pure_noise=fid(lambda index: (uniform(seed, Purpose.SCALE_NOISE, index, shape, 1) * 256).to(torch.uint8)),
    )
