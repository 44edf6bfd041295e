"""A mixture of Gaussians per pixel: its optimal noise prediction and its probability flow are known in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoiser
from darkroom.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Mixture:
    """x_0 ~ sum_k w_k N(m_k, s_k^2), independently for every pixel."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-0.6, 0.4)
    sds: tuple[float, ...] = (0.12, 0.2)

    def eps(self, x: Tensor, alpha_bar: float) -> Tensor:
        """E[eps | x_t = x], by the posterior over components."""
        w, mean, var = self._components(x, alpha_bar)
        z = x[..., None]
        log_density = w.log() - 0.5 * var.log() - 0.5 * (z - mean) ** 2 / var
        component = torch.softmax(log_density, dim=-1)
        eps = (1 - alpha_bar) ** 0.5 * (z - mean) / var
        return (component * eps).sum(-1)

    def cdf(self, x: Tensor, alpha_bar: float) -> Tensor:
        """P(x_t <= x)."""
        w, mean, var = self._components(x, alpha_bar)
        return (w * torch.special.ndtr((x[..., None] - mean) / var.sqrt())).sum(-1)

    def flow(self, x: Tensor, alpha_bar_t: float, alpha_bar_s: float) -> Tensor:
        """Where the probability-flow ODE takes x_t = x: in one dimension it keeps each point's quantile.

        The inverse of the distribution function is found by bisection.
        """
        quantile = self.cdf(x, alpha_bar_t)
        low, high = torch.full_like(x, -10), torch.full_like(x, 10)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha_bar_s) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """The exact eps(x_t, t) under a schedule."""
        alpha_bar = schedule.alpha_bar.tolist()
        return lambda x, t: self.eps(x, alpha_bar[t])

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and variance of x_0."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        second = sum(w * (m * m + s * s) for w, m, s in zip(self.weights, self.means, self.sds, strict=True))
        return mean, second - mean * mean

    def _components(self, x: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and variances of x_t."""
        w, m, s = (torch.tensor(v, dtype=x.dtype) for v in (self.weights, self.means, self.sds))
        return w, math.sqrt(alpha_bar) * m, alpha_bar * s**2 + 1 - alpha_bar
