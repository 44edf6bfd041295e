"""Which images, flips, timesteps, noise and label drops a batch has: functions of (seed, global sample index) alone.

Training counts samples: step k of batch size B takes the global samples k B … k B + B - 1. Sample g is image
`permutation(epoch)[position]` with (epoch, position) = divmod(g, n). So there is no stream to store or to restore, and
a batch that is split over micro-batches or ranks has the same content.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.diffusion.model import to_unit_range
from darkroom.diffusion.objective import add_noise, drop_labels
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


@dataclass(frozen=True)
class Batch:
    """What one training step is about; everything is on the training device."""

    x_t: Tensor  # float32 (B, C, H, W)
    t: Tensor  # int64 (B,)
    labels: Tensor  # int64 (B,), some replaced by the null class
    eps: Tensor  # float32 (B, C, H, W)


@dataclass(frozen=True)
class BatchSource:
    """The training images on the device as uint8, and what turns global sample indices into a batch of them."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    alpha_bar: Tensor  # float64 (T,)
    order: DataOrder
    seed: int
    label_dropout: float
    null_class: int
    horizontal_flip: bool

    def __call__(self, first: int, size: int) -> Batch:
        """The batch of global samples first … first + size - 1."""
        samples = torch.arange(first, first + size)
        chosen = self.order(samples).to(self.images.device)
        samples = samples.to(self.images.device)
        x_0 = to_unit_range(self.images[chosen])
        if self.horizontal_flip:
            flip = uniform(self.seed, Purpose.FLIP, samples) < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        t = integers(self.seed, Purpose.TIMESTEP, samples, len(self.alpha_bar))
        eps = normal(self.seed, Purpose.TRAINING_NOISE, samples, tuple(x_0.shape[1:]))
        labels = self.labels[chosen]
        if self.label_dropout > 0:
            coin = uniform(self.seed, Purpose.LABEL_DROP, samples)
            labels = drop_labels(labels, coin, self.label_dropout, self.null_class)
        return Batch(add_noise(x_0, eps, self.alpha_bar, t), t, labels, eps)
