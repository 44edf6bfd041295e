"""Forward processes: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), tables in float64 on the CPU."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s in Nichol & Dhariwal 2021, eq. 17
MAX_BETA = 0.999


@dataclass(frozen=True)
class Schedule:
    """beta_t for t = 0 … T-1, where index 0 is the paper's first noising step (its t = 1)."""

    betas: Tensor  # float64 (T,), each in (0, 1)

    def __post_init__(self) -> None:
        if self.betas.dtype != torch.float64 or self.betas.ndim != 1:
            raise ValueError(f"expected float64 betas of shape (T,), got {self.betas.dtype} {tuple(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            worst = self.betas[(self.betas <= 0) | (self.betas >= 1) | self.betas.isnan()][0].item()
            raise ValueError(f"expected every beta in (0, 1), got {worst:.6g}: this schedule destroys x_0 in one step")

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def alpha_bar(self) -> Tensor:
        """The share of x_0's variance left after step t: prod_{s <= t} (1 - beta_s), float64 (T,)."""
        return torch.cumprod(1 - self.betas, dim=0)

    @property
    def log_snr(self) -> Tensor:
        """lambda_t = log(alpha_bar_t / (1 - alpha_bar_t)) / 2, float64 (T,), decreasing in t (Lu 2022)."""
        alpha_bar = self.alpha_bar
        return 0.5 * (alpha_bar.log() - (1 - alpha_bar).log())


def linear(num_timesteps: int, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """beta from 1e-4 to 0.02 over 1000 steps (Ho 2020, sec. 4); for other lengths scaled by 1000/T.

    Raises ValueError when that scaling pushes beta to 1, as it does at T = 20.
    """
    scale = 1000 / num_timesteps
    return Schedule(torch.linspace(scale * first, scale * last, num_timesteps, dtype=torch.float64))


def cosine(num_timesteps: int) -> Schedule:
    """alpha_bar(t) = cos^2((t/T + s) / (1 + s) pi/2), normalised at 0, beta capped (Nichol & Dhariwal 2021, eq. 17)."""

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return Schedule((1 - alpha_bar(u[1:]) / alpha_bar(u[:-1])).clamp(max=MAX_BETA))


def make_schedule(name: Literal["linear", "cosine"], num_timesteps: int) -> Schedule:
    """The schedule that `train.schedule` in params.yaml names."""
    return linear(num_timesteps) if name == "linear" else cosine(num_timesteps)
