"""The simplified objective of DDPM: E || eps - eps_theta(x_t, t, y) ||^2 (Ho 2020, eq. 14)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EpsModel = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_noise(x_0: Tensor, eps: Tensor, alpha_bar: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, float32 (N, C, H, W) (Ho 2020, eq. 4).

    `alpha_bar` is the float64 table (T,) on the same device and `t` int64 (N,). The coefficients are computed in
    float64 and applied in float32: in bf16 the first timesteps would get no noise at all.
    """
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt().float() * x_0.float() + (1 - a).sqrt().float() * eps


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_class: int) -> Tensor:
    """Replace labels (N,) by the null class where `uniform` (N,) < `probability` (Ho & Salimans 2022, alg. 1)."""
    return torch.where(uniform < probability, null_class, labels)


def simple_loss(model: EpsModel, x_t: Tensor, t: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the predicted noise over batch, channels and pixels; a float32 scalar."""
    return F.mse_loss(model(x_t, t, labels).float(), eps)
