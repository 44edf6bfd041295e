"""Features of images under an extractor, in the form that torchmetrics' FID and KID take."""

from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.nets.classifier import Classifier

WEIGHTS_FILE = "classifier.safetensors"
CARD_FILE = "extractor.json"
BATCH = 512
TURNS = 4  # of an image by quarter turns: what a classifier without classes tells apart


class ExtractorCard(BaseModel):
    """`extractor.json`: what the classifier is, and what it was fitted to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    image_size: int
    image_channels: int
    classes: list[str]  # empty: the classifier tells how an image is turned (fitting.py)
    channels: list[int]
    features: int
    held_out_accuracy: float  # in what the classifier tells apart
    data_digest: str
    weights_digest: str  # sha256 of classifier.safetensors

    def build(self) -> Classifier:
        """The classifier, with fresh weights."""
        return Classifier(
            image_channels=self.image_channels,
            image_size=self.image_size,
            num_classes=len(self.classes) or TURNS,
            channels=self.channels,
            features=self.features,
        )


class Extractor(nn.Module):
    """Maps uint8 images (N, C, H, W) to float64 features (N, num_features); classifies them on the side."""

    def __init__(self, card: ExtractorCard, classifier: Classifier) -> None:
        super().__init__()
        self.card = card
        self.classifier = classifier.eval().requires_grad_(False)
        self.num_features = card.features

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what the reference stage wrote. Raises InputError if a file is missing, damaged or not the other's."""
        card_path, weights_path = directory / CARD_FILE, directory / WEIGHTS_FILE
        for path in (card_path, weights_path):
            if not path.is_file():
                raise InputError(f"{path}: no such file; `dvc repro reference` makes it")
        try:
            card = ExtractorCard.model_validate_json(card_path.read_bytes())
        except ValidationError as error:
            raise InputError(f"{card_path}: {error.errors()[0]['msg']}") from None
        if digest_file(weights_path) != card.weights_digest:
            raise InputError(f"{weights_path}: its sha256 is not the one in {CARD_FILE}")
        classifier = card.build()
        try:
            classifier.load_state_dict(load_file(weights_path))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{weights_path}: does not hold this classifier: {error}") from None
        return cls(card, classifier)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Float64 features of uint8 images, in batches of 512."""
        batches = [self.classifier.features(scale(part)) for part in torch.split(images, BATCH)]
        return torch.cat(batches).double()

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of uint8 `images` (N, C, H, W) that the classifier gives their `labels` int64 (N,)."""
        predicted = torch.cat([self.classifier(scale(part)).argmax(1) for part in torch.split(images, BATCH)])
        return (predicted == labels).double().mean().item()

    def class_accuracy(self, images: Tensor, labels: Tensor) -> float | None:
        """`accuracy` if `labels` are classes; None for images without classes, where it has no meaning."""
        return self.accuracy(images, labels) if self.card.classes else None


def scale(images: Tensor) -> Tensor:
    """uint8 [0, 255] to the classifier's float32 [-1, 1]."""
    return images.float() / 127.5 - 1
