"""Features and classes of many images, on any number of processes with the same result."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.evaluation.features import Extractor
from darkroom.evaluation.sharing import Alone, Sharing


@dataclass(frozen=True)
class Features:
    """What an extractor says about images."""

    values: Tensor  # float32 (N, F)
    predicted: Tensor  # int64 (N,), the label that the classifier gives

    def of(self, index: Tensor) -> "Features":
        """Those of some images, int64 (M,)."""
        return Features(self.values[index], self.predicted[index])

    def accuracy(self, labels: Tensor) -> float:
        """The share whose prediction is the label, int64 (N,)."""
        return (self.predicted == labels).double().mean().item()

    def class_accuracies(self, labels: Tensor, num_classes: int) -> list[float]:
        """The same for each class; NaN for one without images."""
        return [self.accuracy_of(labels, label) for label in range(num_classes)]

    def accuracy_of(self, labels: Tensor, label: int) -> float:
        """The share among images of one class."""
        return (self.predicted[labels == label] == label).double().mean().item()


def joined(features: list[Features]) -> Features:
    """All of several sets, in their order."""
    return Features(torch.cat([f.values for f in features]), torch.cat([f.predicted for f in features]))


def extract(
    extractor: Extractor,
    images: Tensor,
    sharing: Sharing | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features | None:
    """Features of uint8 images (N, C, H, W); on several processes on the first one, None on the others.

    The batches are the same on any number of processes, and so are the features. `progress` counts images.
    """
    sharing = sharing or Alone()
    size = extractor.batch_size
    batches = -(-len(images) // size)
    own = sharing.share(batches)
    values = torch.zeros((own.stop - own.start, size, extractor.num_features))
    predicted = torch.zeros((own.stop - own.start, size), dtype=torch.int64)
    for place, number in enumerate(range(own.start, own.stop)):
        batch = images[number * size : (number + 1) * size]
        found = extractor.measure(batch)
        values[place, : len(batch)], predicted[place, : len(batch)] = found
        if progress:
            progress(min((place + 1) * size * batches // max(own.stop - own.start, 1), len(images)))
    gathered = sharing.gather(values, batches), sharing.gather(predicted, batches)
    if gathered[0] is None or gathered[1] is None:
        return None
    return Features(gathered[0].flatten(0, 1)[: len(images)], gathered[1].flatten()[: len(images)])
