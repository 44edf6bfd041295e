"""What images are measured with: a network for features, and a classifier that judges their classes."""

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
from darkroom.nets.inception import InceptionV3, load_inception

WEIGHTS_FILE = "classifier.safetensors"
INCEPTION_FILE = "inception.safetensors"
CARD_FILE = "extractor.json"
TURNS = 4  # of an image by quarter turns: what a classifier without classes tells apart
_BATCH = {"classifier": 512, "inception": 64}  # an image at 299x299 takes a thousand times the memory of a digit


class ExtractorCard(BaseModel):
    """`extractor.json`: what the classifier is, what it was fitted to, and whose features count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    kind: Literal["classifier", "inception"]
    image_size: int
    image_channels: int
    classes: list[str]  # empty: the classifier tells how an image is turned (fitting.py)
    channels: list[int]
    features: int  # of the classifier
    held_out_accuracy: float  # in what the classifier tells apart
    data_digest: str
    classifier_digest: str  # sha256 of classifier.safetensors
    inception_digest: str | None = None  # sha256 of inception.safetensors
    inception_source: str | None = None  # sha256 of the public file that it was made from

    @property
    def weights_digest(self) -> str:
        """Of the network whose features count; of Inception that of the public file, by which everybody knows it."""
        return self.inception_source or self.classifier_digest

    @property
    def resize(self) -> str:
        """How images are brought to the network's size."""
        return "none" if self.kind == "classifier" else "bilinear to 299, as TensorFlow 1 does"

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
    """Maps uint8 images (N, C, H, W) to features and to the labels that the classifier gives them."""

    def __init__(self, card: ExtractorCard, classifier: Classifier, inception: InceptionV3 | None = None) -> None:
        super().__init__()
        self.card = card
        self.classifier = classifier.eval().requires_grad_(False)
        self.inception = inception
        self.num_features = card.features if inception is None else inception.num_features
        self.batch_size = _BATCH[card.kind]

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu") -> Self:
        """Read what the reference stage wrote. Raises InputError if a file is missing, damaged or not the other's."""
        card = read_card(directory)
        classifier = card.build()
        path = _verified(directory / WEIGHTS_FILE, card.classifier_digest)
        try:
            classifier.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{path}: does not hold this classifier: {error}") from None
        inception = None
        if card.inception_digest is not None:
            inception = load_inception(_verified(directory / INCEPTION_FILE, card.inception_digest))
        return cls(card, classifier, inception).to(device)

    @torch.inference_mode()
    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 features (N, num_features) and labels int64 (N,) of one batch of uint8 images, on the CPU."""
        images = images.to(next(self.classifier.parameters()).device)
        x = scale(images)
        features = self.classifier.features(x)
        predicted = self.classifier.read_out(features).argmax(1)
        if self.inception is not None:
            features = self.inception.features(images)
        return features.float().cpu(), predicted.cpu()


def read_card(directory: Path) -> ExtractorCard:
    """Raises InputError if `extractor.json` is missing or garbled."""
    path = directory / CARD_FILE
    try:
        return ExtractorCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `dvc repro reference` makes it") from None
    except ValidationError as error:
        raise InputError(f"{path}: {error.errors()[0]['msg']}; `dvc repro reference` makes it anew") from None


def _verified(path: Path, digest: str) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file; `dvc repro reference` makes it")
    if digest_file(path) != digest:
        raise InputError(f"{path}: its sha256 is not the one in {CARD_FILE}")
    return path


def scale(images: Tensor) -> Tensor:
    """uint8 [0, 255] to the classifier's float32 [-1, 1]."""
    return images.float() / 127.5 - 1
