"""A mixture of Gaussians per pixel: the noise prediction that minimises the loss is known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """x_0 ~ sum_k w_k N(m_k, s_k^2), independently for every pixel."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-0.6, 0.4)
    sds: tuple[float, ...] = (0.12, 0.2)

    def eps(self, x: Tensor, alpha_bar: float) -> Tensor:
        """E[eps | x_t = x], by the posterior over components."""
        w, m, s = (torch.tensor(v, dtype=x.dtype) for v in (self.weights, self.means, self.sds))
        mean, var = alpha_bar**0.5 * m, alpha_bar * s**2 + 1 - alpha_bar
        z = x[..., None]
        log_density = w.log() - 0.5 * var.log() - 0.5 * (z - mean) ** 2 / var
        component = torch.softmax(log_density, dim=-1)
        eps = (1 - alpha_bar) ** 0.5 * (z - mean) / var
        return (component * eps).sum(-1)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of x_0."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        second = sum(w * (m * m + s * s) for w, m, s in zip(self.weights, self.means, self.sds, strict=True))
        return mean, second - mean * mean
