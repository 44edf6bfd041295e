"""Samplers: pure functions of (denoiser, noise, schedule, timesteps). State is float32, coefficients are float64.

Each runs over a decreasing list of timesteps and ends at x_0, where alpha_bar = 1. All coefficients come from alpha_bar
at the timesteps that are really visited, so skipping steps needs no special case.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoiser
from darkroom.diffusion.schedules import Schedule

MIN_LOG_SNR = -5.1  # few-step samplers start here: at the end of the cosine schedule 1/sqrt(alpha_bar) is 20,291

StepNoise = Callable[[int, Tensor], Tensor]  # (step number, x) -> standard normal of x's shape


class Sampler(Protocol):
    """What every sampler is called with; `clip` keeps the estimate of x_0 in [-1, 1]."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        schedule: Schedule,
        timesteps: Sequence[int],
        step_noise: StepNoise,
        *,
        clip: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor: ...


def spaced_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` timesteps, decreasing, evenly spaced from the end of the process ("trailing": round(T, T - T/N, …) - 1).

    With fewer steps than T the list starts where log_snr >= -5.1. Raises ValueError unless 1 <= steps <= T.
    """
    total = schedule.num_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps = {steps}: expected 1 to {total}, the number of timesteps of the schedule")
    if steps == total:
        return list(range(total - 1, -1, -1))
    usable = max(steps, int((schedule.log_snr >= MIN_LOG_SNR).sum()))
    return [round(usable - i * usable / steps) - 1 for i in range(steps)]


def _x_0_and_eps(x: Tensor, eps: Tensor, alpha_bar: float, clip: bool) -> tuple[Tensor, Tensor]:
    """The estimate of x_0 and the noise that belongs to it; when x_0 is clipped, eps is derived anew."""
    x_0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    if clip:
        x_0 = x_0.clamp(-1, 1)
        eps = (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
    return x_0, eps


def _chain(schedule: Schedule, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, alpha_bar at t, alpha_bar at the next timestep) for each step; the last one leads to alpha_bar = 1."""
    alpha_bar = schedule.alpha_bar.tolist()
    here = [alpha_bar[t] for t in timesteps]
    return list(zip(timesteps, here, [*here[1:], 1.0], strict=True))


def _at(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    timesteps: Sequence[int],
    step_noise: StepNoise,
    *,
    clip: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior variance beta-tilde (Ho 2020, eqs. 6-7), exact for any skipped steps."""
    for step, (t, a_t, a_s) in enumerate(_chain(schedule, timesteps)):
        x_0, _ = _x_0_and_eps(x, denoise(x, _at(t, x)), a_t, clip)
        alpha = a_t / a_s  # 1 - beta of the step from s to t
        mean = math.sqrt(a_s) * (1 - alpha) / (1 - a_t) * x_0 + math.sqrt(alpha) * (1 - a_s) / (1 - a_t) * x
        sd = math.sqrt((1 - a_s) / (1 - a_t) * (1 - alpha))
        x = mean + sd * step_noise(step, x) if sd > 0 else mean
        if progress:
            progress(step + 1)
    return x


def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    timesteps: Sequence[int],
    step_noise: StepNoise,
    *,
    clip: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song 2021, eq. 12 with eta = 0)."""
    for step, (t, a_t, a_s) in enumerate(_chain(schedule, timesteps)):
        x_0, eps = _x_0_and_eps(x, denoise(x, _at(t, x)), a_t, clip)
        x = math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * eps
        if progress:
            progress(step + 1)
    return x


def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    timesteps: Sequence[int],
    step_noise: StepNoise,
    *,
    clip: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """DPM-Solver++(2M), multistep, of second order in x_0 (Lu 2022b, alg. 2); first and last step are first order."""
    previous: tuple[Tensor, float] | None = None  # the last x_0 and the width of the step that used it, in log-SNR
    for step, (t, a_t, a_s) in enumerate(_chain(schedule, timesteps)):
        x_0, _ = _x_0_and_eps(x, denoise(x, _at(t, x)), a_t, clip)
        if a_s == 1.0:  # sigma_s = 0: the step ends on the estimate itself
            return_x, h = x_0, math.inf
        else:
            h = _log_snr(a_s) - _log_snr(a_t)
            direction = x_0
            if previous is not None:
                last_x_0, last_h = previous
                direction = x_0 + h / (2 * last_h) * (x_0 - last_x_0)
            return_x = math.sqrt((1 - a_s) / (1 - a_t)) * x - math.sqrt(a_s) * math.expm1(-h) * direction
        x, previous = return_x, (x_0, h)
        if progress:
            progress(step + 1)
    return x


def _log_snr(alpha_bar: float) -> float:
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
