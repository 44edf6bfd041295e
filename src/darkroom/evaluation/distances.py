"""FID and KID between sets of features, by torchmetrics in float64.

Each process computes alone: torchmetrics would wait for other ranks, which have given their features already.
"""

import warnings
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

BLOCK = 4096  # images that are float64 at a time
PANEL = 256  # columns of the sum of outer products that one matrix product adds to


@dataclass(frozen=True)
class KID:
    """Mean and standard deviation over random subsets."""

    mean: float
    std: float


class Moments:
    """Number, sum and sum of outer products of features: all that FID needs to know of a set, whatever its size.

    Sums are float64. `features` may be any floating dtype, a memory map included: a block of it is in memory at a time.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        """Of no images yet."""
        self.n = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._upper = torch.zeros((num_features, num_features), dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor, counts: Tensor | None = None) -> Self:
        """The moments of features (N, F), each counted as often as `counts` (N,) says; by default once."""
        moments = cls(features.shape[1], features.device)
        moments.add(features, counts)
        return moments

    @classmethod
    def from_statistics(cls, mean: Tensor, covariance: Tensor, n: int) -> Self:
        """What `n` images of this mean (F,) and unbiased covariance (F, F) have: of published statistics.

        FID depends on mean and covariance alone, so any n >= 2 gives the same. Raises ValueError if their shapes do not
        fit, a value is not finite, or the covariance is not symmetric.
        """
        mean, covariance = mean.double(), covariance.double()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"expected a mean (F,) and a covariance (F, F), got {shapes}")
        if n < 2:
            raise ValueError(f"expected statistics of at least 2 images, got {n}")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("mean and covariance are not all finite")
        if (covariance - covariance.T).abs().max() > 1e-6 * covariance.abs().max():
            raise ValueError("the covariance is not symmetric")
        moments = cls(len(mean), mean.device)
        moments.n, moments.sum = n, n * mean
        moments._upper = (n - 1) * (covariance + covariance.T) / 2 + n * torch.outer(mean, mean)
        return moments

    def add(self, features: Tensor, counts: Tensor | None = None) -> None:
        """Add features (N, F), each as often as the integer `counts` (N,) says. ValueError unless all are finite."""
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"expected features (N, {len(self.sum)}), got {tuple(features.shape)}")
        for start in range(0, len(features), BLOCK):
            x = features[start : start + BLOCK].double()
            weight = torch.ones_like(x[:, 0]) if counts is None else counts[start : start + BLOCK].to(x)
            total = weight @ x
            if not torch.isfinite(total).all():
                raise ValueError(f"features of images {start} to {start + len(x) - 1} are not all finite")
            weighted = x if counts is None else x * weight[:, None]
            self.n += int(weight.sum())
            self.sum += total
            for first in range(0, x.shape[1], PANEL):  # the upper triangle alone takes little more than half the time
                self._upper[first : first + PANEL, first:].addmm_(weighted[:, first : first + PANEL].T, x[:, first:])

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.sum)

    @property
    def outer(self) -> Tensor:
        """The sum over images of x xᵀ, float64 (F, F)."""
        return self._upper.triu() + self._upper.triu(1).T

    @property
    def mean(self) -> Tensor:
        """Float64 (F,)."""
        return self.sum / self.n

    @property
    def covariance(self) -> Tensor:
        """Unbiased (n - 1), float64 (F, F). ValueError for fewer than two images."""
        if self.n < 2:
            raise ValueError(f"a covariance takes at least 2 images, got {self.n}")
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


class _Precomputed(nn.Module):
    """Stands where torchmetrics expects the network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Moments, generated: Moments) -> float:
    """FID (Heusel 2017, eq. 6): |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), of sets of at least two images each.

    It is what torchmetrics computes from the features themselves. Raises ValueError if the dimensions differ.
    """
    if real.num_features != generated.num_features:
        raise ValueError(f"features of {real.num_features} and {generated.num_features} dimensions have no distance")
    for moments in (real, generated):
        if moments.n < 2:
            raise ValueError(f"FID takes at least 2 images on each side, got {moments.n}")
    metric = FrechetInceptionDistance(feature=_Precomputed(real.num_features), sync_on_compute=False).set_dtype(
        torch.float64
    )
    metric.update(real.sum.new_empty((0, real.num_features)), real=True)  # sets the dtype of the result
    metric.real_features_num_samples = torch.tensor(real.n)
    metric.real_features_sum, metric.real_features_cov_sum = real.sum, real.outer
    metric.fake_features_num_samples = torch.tensor(generated.n)
    metric.fake_features_sum, metric.fake_features_cov_sum = generated.sum, generated.outer
    distance: float = metric.compute().item()
    return distance


class ReferenceDistance:
    """Distances of any number of sets of features from one reference set, whose moments are computed once."""

    def __init__(self, reference: Tensor, statistics: Moments | None = None) -> None:
        """`reference` is (N, F); `statistics`, published ones for instance, stand for it in FID, but not in KID.

        Warns when there are fewer images than dimensions: the covariance is singular then.
        """
        self.moments = Moments.of(reference) if statistics is None else statistics
        if self.moments.n < self.moments.num_features:
            counts = f"{self.moments.n} images at {self.moments.num_features} dimensions"
            warnings.warn(f"FID from {counts}: singular covariance", stacklevel=2)
        self._reference = reference

    def fid(self, features: Tensor) -> float:
        """Frechet distance of features (M, F). Its bias is about 1/M: compare at equal M only."""
        return frechet_distance(self.moments, Moments.of(features))

    def kid(self, features: Tensor, subsets: int, subset_size: int, seed: int) -> KID:
        """Unbiased polynomial MMD (Binkowski 2018) over random subsets of both sets, drawn by `seed` alone."""
        with warnings.catch_warnings():  # it warns that it keeps all features, which are kept here anyway
            warnings.simplefilter("ignore", UserWarning)
            kid = KernelInceptionDistance(
                feature=_Precomputed(features.shape[1]), subsets=subsets, subset_size=subset_size, sync_on_compute=False
            )
        kid.update(self._reference.double(), real=True)
        kid.update(features.double(), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mean, std = kid.compute()
        return KID(mean.item(), std.item())
