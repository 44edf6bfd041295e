"""A small convolutional classifier: its penultimate features measure images where Inception makes no sense."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Convolutions with a max pool after each width but the last, a feature layer, a linear read-out.

    Takes float32 images in [-1, 1] of shape (N, image_channels, H, W).
    """

    def __init__(
        self, *, image_channels: int, image_size: int, num_classes: int, channels: Sequence[int], features: int
    ) -> None:
        super().__init__()
        self.num_features = features
        blocks: list[nn.Module] = []
        inputs, side = image_channels, image_size
        for depth, width in enumerate(channels):
            if depth > 0 and side >= 2:
                blocks.append(nn.MaxPool2d(2))
                side //= 2
            blocks += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.trunk = nn.Sequential(*blocks)
        self.penultimate = nn.Linear(inputs * side * side, features)
        self.read_out = nn.Linear(features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, float32 (N, features), non-negative."""
        return F.relu(self.penultimate(self.trunk(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, num_classes)."""
        logits: Tensor = self.read_out(self.features(images))
        return logits
