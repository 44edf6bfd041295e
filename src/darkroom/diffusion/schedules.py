"""Forward processes: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), tables in float64 on the CPU."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s in Nichol & Dhariwal 2021, eq. 17
MAX_BETA = 0.999


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x_0) = N(x_0 * x_0 + x_t * x_t, variance I): two coefficients, each under the name of its factor."""

    x_0: float
    x_t: float
    variance: float  # beta-tilde: that of x_s when x_0 is known
    beta: float  # 1 - alpha_bar_t / alpha_bar_s: that of the noise which the step from s to t adds


@dataclass(frozen=True, eq=False)  # two tensors have no single truth value
class Schedule:
    """beta_t for t = 0 … T-1, where index 0 is the paper's first noising step (its t = 1).

    Everything else follows from the betas, here and nowhere else. Raises ValueError unless each beta lies in (0, 1) and
    alpha_bar falls at every step and stays above 0 in float64, so that no table holds an infinity or NaN.
    """

    betas: Tensor  # float64 (T,)

    def __post_init__(self) -> None:
        if self.betas.dtype != torch.float64 or self.betas.ndim != 1 or len(self.betas) == 0:
            raise ValueError(f"expected float64 betas of shape (T,), got {self.betas.dtype} {tuple(self.betas.shape)}")
        impossible = (~((self.betas > 0) & (self.betas < 1))).nonzero().flatten()
        if len(impossible):
            t = int(impossible[0])
            raise ValueError(f"expected every beta in (0, 1), got {self.betas[t]:.6g} at t = {t} of {len(self.betas)}")
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        stalled = (torch.cat((one, self.alpha_bar, zero)).diff() >= 0).nonzero().flatten()
        if len(stalled):
            t = min(int(stalled[0]), len(self.betas) - 1)
            raise ValueError(
                f"expected alpha_bar to fall from 1 and stay above 0, got {self.alpha_bar[t]:.6g} at t = {t}"
            )

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas(self) -> Tensor:
        """1 - beta_t, float64 (T,)."""
        return 1 - self.betas

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The share of x_0's variance left after step t: prod_{s <= t} alpha_s, float64 (T,) (Ho 2020, eq. 4)."""
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), float64 (T,), decreasing in t."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def log_snr(self) -> Tensor:
        """lambda_t = log(snr_t) / 2, the logarithm of the ratio of amplitudes, float64 (T,) (Lu 2022)."""
        return self.snr.log() / 2

    @cached_property
    def sigma(self) -> Tensor:
        """The noise level of x_t / sqrt(alpha_bar_t) = x_0 + sigma_t eps, float64 (T,): the sigma of Karras 2022."""
        return self.snr.rsqrt()

    def posterior(self, t: int, s: int | None) -> Posterior:
        """q(x_s | x_t, x_0) for any s < t, adjacent or not; s None (or -1) is x_0 itself, where alpha_bar = 1.

        This is Ho 2020, eqs. 6-7, with alpha and beta of the one step from s to t, so skipped timesteps are exact.
        Raises ValueError unless -1 <= s < t < T.
        """
        s = -1 if s is None else s
        if not -1 <= s < t < self.num_timesteps:
            raise ValueError(f"posterior from t = {t} to s = {s}: expected -1 <= s < t < {self.num_timesteps}")
        alpha_bar_t = float(self.alpha_bar[t])
        alpha_bar_s = float(self.alpha_bar[s]) if s >= 0 else 1.0
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        return Posterior(
            x_0=math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t),
            x_t=math.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t),
            variance=(1 - alpha_bar_s) / (1 - alpha_bar_t) * beta,
            beta=beta,
        )


def linear(num_timesteps: int, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """beta from 1e-4 to 0.02 over 1000 steps (Ho 2020, sec. 4); for other lengths scaled by 1000/T.

    Raises ValueError when that scaling pushes beta to 1, as it does at T = 20.
    """
    _check_length(num_timesteps)
    scale = 1000 / num_timesteps
    return Schedule(torch.linspace(scale * first, scale * last, num_timesteps, dtype=torch.float64))


def cosine(num_timesteps: int) -> Schedule:
    """alpha_bar(t) = cos^2((t/T + s) / (1 + s) pi/2), normalised at 0, beta capped (Nichol & Dhariwal 2021, eq. 17)."""

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    _check_length(num_timesteps)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return Schedule((1 - alpha_bar(u[1:]) / alpha_bar(u[:-1])).clamp(max=MAX_BETA))


def _check_length(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps = {num_timesteps}: expected at least 1")


def make_schedule(name: Literal["linear", "cosine"], num_timesteps: int) -> Schedule:
    """The schedule that `train.schedule` in params.yaml names."""
    return linear(num_timesteps) if name == "linear" else cosine(num_timesteps)
