"""Which images, flips, timesteps, noise and label drops a batch has: functions of (seed, global sample index) alone.

Training counts samples: step k of batch size B takes the global samples k B … k B + B - 1. Sample g is image
`permutation(epoch)[position]` with (epoch, position) = divmod(g, n). So there is no stream to store or to restore, and
a batch that is split over micro-batches or ranks has the same content.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from darkroom.diffusion.objective import (
    Prediction,
    Weighting,
    add_noise,
    drop_labels,
    loss_weight,
    training_target,
)
from darkroom.diffusion.pixels import to_unit_range
from darkroom.randomness import Purpose, integers, normal, permutation, uniform


class DataOrder:
    """Maps global sample indices to images; every epoch has a permutation of its own."""

    def __init__(self, seed: int, num_images: int) -> None:
        self.seed, self.num_images = seed, num_images
        self._epochs: dict[int, Tensor] = {}  # the permutations of the last batch, as a cache

    def __call__(self, samples: Tensor) -> Tensor:
        """Image numbers int64 (B,) for global sample indices int64 (B,), both on the CPU."""
        epochs, positions = samples // self.num_images, samples % self.num_images
        needed = torch.unique(epochs).tolist()
        self._epochs = {epoch: self._permutation(epoch) for epoch in needed}
        images = torch.empty_like(samples)
        for epoch in needed:
            chosen = epochs == epoch
            images[chosen] = self._epochs[epoch][positions[chosen]]
        return images

    def _permutation(self, epoch: int) -> Tensor:
        known = self._epochs.get(epoch)
        return permutation(self.seed, Purpose.DATA_ORDER, epoch, self.num_images) if known is None else known


class Images(Protocol):
    """The images and labels of consecutive global samples, wherever they are kept."""

    @property
    def device(self) -> torch.device:
        """Where training takes place."""

    def __call__(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Images uint8 (size, C, H, W) and labels int64 (size,) of samples first … first + size - 1, on `device`."""

    def close(self) -> None:
        """End whatever works in the background."""


class ResidentImages:
    """All images in the memory of the device, where batches are gathered."""

    def __init__(self, images: Tensor, labels: Tensor, order: DataOrder) -> None:
        """`images` uint8 (N, C, H, W) and `labels` int64 (N,), both on the training device."""
        self._images, self._labels, self._order = images, labels, order

    @property
    def device(self) -> torch.device:
        return self._images.device

    def __call__(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        chosen = without_waiting(self._order(torch.arange(first, first + size)), self.device)
        return self._images[chosen], self._labels[chosen]

    def close(self) -> None:
        """Nothing works in the background here."""


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`; a plain copy to a GPU waits until the GPU has nothing else to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Batch:
    """What one training step is about; everything is on the training device."""

    x_t: Tensor  # float32 (B, C, H, W)
    t: Tensor  # int64 (B,)
    labels: Tensor  # int64 (B,), some replaced by the null class
    target: Tensor  # float32 (B, C, H, W): eps, x_0 or v
    weight: Tensor | None  # float32 (B,): how much each sample's loss counts; None if all count 1


@dataclass(frozen=True)
class BatchSource:
    """Turns global sample indices into a batch of them; `close` it when the training is over."""

    images: Images
    alpha_bar: Tensor  # float64 (T,), on the device of the images
    seed: int
    prediction: Prediction
    loss_weighting: Weighting
    label_dropout: float
    null_class: int
    horizontal_flip: bool

    def __call__(self, first: int, size: int) -> Batch:
        """The batch of global samples first … first + size - 1: any slice, in any order.

        Streamed images are read ahead for a `first` that grows by the same amount from call to call. Raises StageFailed
        when they cannot be read.
        """
        images, labels = self.images(first, size)
        device = self.images.device
        # What is one number a sample is drawn on the CPU: equal bits, and hundreds of operations less for a GPU.
        samples = torch.arange(first, first + size)
        if self.horizontal_flip:
            flip = without_waiting(uniform(self.seed, Purpose.FLIP, samples) < 0.5, device)
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        x_0 = to_unit_range(images)
        t = without_waiting(integers(self.seed, Purpose.TIMESTEP, samples, len(self.alpha_bar)), device)
        here = without_waiting(samples, device)
        eps = normal(self.seed, Purpose.TRAINING_NOISE, here, tuple(x_0.shape[1:]))
        if self.label_dropout > 0:
            coin = without_waiting(uniform(self.seed, Purpose.LABEL_DROP, samples), device)
            labels = drop_labels(labels, coin, self.label_dropout, self.null_class)
        return Batch(
            x_t=add_noise(x_0, eps, self.alpha_bar, t),
            t=t,
            labels=labels,
            target=training_target(self.prediction, x_0, eps, self.alpha_bar, t),
            weight=loss_weight(self.loss_weighting, self.prediction, self.alpha_bar, t),
        )

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        self.images.close()
