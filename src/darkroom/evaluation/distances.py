"""FID and KID between sets of features, by torchmetrics in float64."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


@dataclass(frozen=True)
class KID:
    """Mean and standard deviation over random subsets."""

    mean: float
    std: float


class _Precomputed(nn.Module):
    """Stands where torchmetrics expects the network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class ReferenceDistance:
    """Distances of any number of sets of features from one reference set, whose statistics are computed once."""

    def __init__(self, reference: Tensor) -> None:
        """`reference` is float64 (N, F). Warns when N < F: the covariance is singular then."""
        n, num_features = reference.shape
        if n < num_features:
            warnings.warn(f"FID from {n} images at {num_features} dimensions: singular covariance", stacklevel=2)
        self._reference = reference
        self._fid = FrechetInceptionDistance(feature=_Precomputed(num_features), reset_real_features=False)
        self._fid.set_dtype(torch.float64)
        self._fid.update(reference, real=True)

    def fid(self, features: Tensor) -> float:
        """Frechet distance of float64 (M, F) (Heusel 2017, eq. 6). Its bias is about 1/M: compare at equal M only."""
        self._fid.reset()
        self._fid.update(features, real=False)
        distance: float = self._fid.compute().item()
        return distance

    def kid(self, features: Tensor, subsets: int, subset_size: int, seed: int) -> KID:
        """Unbiased polynomial MMD (Binkowski 2018) over random subsets of both sets, drawn by `seed` alone."""
        with warnings.catch_warnings():  # it warns that it keeps all features, which are kept here anyway
            warnings.simplefilter("ignore", UserWarning)
            kid = KernelInceptionDistance(
                feature=_Precomputed(features.shape[1]), subsets=subsets, subset_size=subset_size
            )
        kid.set_dtype(torch.float64)
        kid.update(self._reference, real=True)
        kid.update(features, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mean, std = kid.compute()
        return KID(mean.item(), std.item())
