"""Samplers: pure functions of (denoiser, noise, schedule, timesteps, options) that return x_0.

Each runs over a decreasing list of timesteps and ends at the data, where alpha_bar = 1. All coefficients come from
alpha_bar at the timesteps that are really visited, so skipping timesteps needs no special case. The state keeps the
dtype of the noise; coefficients are Python floats, so nothing in the loop waits for a device.

What all of them need is `_sampler`'s: the chain of noise levels, the estimate of x_0, the calls of `on_step`.
What is left of each is its algorithm, as a generator of (x, estimate of x_0) after each step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoiser
from darkroom.diffusion.schedules import Posterior, Schedule

StepNoise = Callable[[int, Tensor], Tensor]  # (step from 0, x) -> standard normal of x's shape and dtype
Threshold = Callable[[Tensor], Tensor]  # the estimate of x_0 (N, C, H, W) -> the same, kept in range

DYNAMIC_QUANTILE = 0.995  # the percentile p of Saharia 2022


def static_threshold(x_0: Tensor) -> Tensor:
    """Clip to [-1, 1], where images are. Not for latents."""
    return x_0.clamp(-1, 1)


def dynamic_threshold(x_0: Tensor) -> Tensor:
    """Clip each sample of (N, C, H, W) to its own 99.5 % quantile of |x_0|, where above 1, and divide by it.

    Saharia 2022, sec. 2.3: under strong guidance it keeps more detail than clipping, which saturates.
    """
    s = torch.quantile(x_0.abs().flatten(1), DYNAMIC_QUANTILE, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    return x_0.clamp(-s, s) / s


THRESHOLDS: dict[str, Threshold | None] = {"none": None, "static": static_threshold, "dynamic": dynamic_threshold}


@dataclass(frozen=True)
class Sampling:
    """What a sampler may be told besides where to start.

    Raises ValueError for an eta outside [0, 1], and for one above 0 without `step_noise`.
    """

    step_noise: StepNoise | None = None  # what the stochastic samplers draw
    threshold: Threshold | None = None  # applied to each estimate of x_0; eps follows from the result
    eta: float = 0.0  # of ddim: 0 is deterministic, 1 is DDPM
    on_step: Callable[[int, Tensor], None] | None = None  # (number of finished steps, estimate of x_0)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta = {self.eta}: expected 0 (deterministic) to 1 (DDPM)")
        if self.eta > 0:
            self.noise_for(f"ddim with eta = {self.eta}")

    def noise_for(self, sampler: str) -> StepNoise:
        """`step_noise`; raises ValueError if there is none."""
        if self.step_noise is None:
            raise ValueError(f"{sampler} draws noise at every step: expected a function as step_noise, got None")
        return self.step_noise


DEFAULTS = Sampling()


class Sampler(Protocol):
    """From x_t at timesteps[0], float (N, C, H, W), to x_0 of the same shape and dtype.

    Raises ValueError unless `timesteps` is strictly decreasing, in 0 … T-1 and not empty, or if a sampler that draws
    noise is not given any; before the first call of `denoise`.
    """

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        schedule: Schedule,
        timesteps: Sequence[int],
        options: Sampling = DEFAULTS,
    ) -> Tensor: ...


class Level(NamedTuple):
    """One noise level: x_t = signal x_0 + noise eps. These are alpha_t, sigma_t and lambda_t of DPM-Solver."""

    t: int
    signal: float  # sqrt(alpha_bar_t)
    noise: float  # sqrt(1 - alpha_bar_t)
    log_snr: float  # log(signal / noise)

    @property
    def sigma(self) -> float:
        """The noise level of x_t / signal: the sigma of EDM."""
        return self.noise / self.signal


DATA = Level(t=-1, signal=1.0, noise=0.0, log_snr=math.inf)


class Step(NamedTuple):
    """One step of a chain, from the level t to the less noisy s; the last one leads to DATA."""

    number: int  # from 0
    t: Level
    s: Level
    posterior: Posterior  # q(x_s | x_t, x_0)


Predict = Callable[[Tensor, Level], Tensor]  # (x_t, its level) -> the estimate of x_0
Trajectory = Iterator[tuple[Tensor, Tensor]]  # after each step: x_s and the estimate of x_0 that led there
Solver = Callable[[Tensor, list[Step], Predict, Sampling], Trajectory]


def _chain(schedule: Schedule, timesteps: Sequence[int]) -> list[Step]:
    """The steps between the listed timesteps and on to the data. Raises ValueError as in `Sampler`."""
    if len(timesteps) == 0:
        raise ValueError("no timesteps: expected at least one")
    for t in timesteps:
        if not 0 <= t < schedule.num_timesteps:
            raise ValueError(f"timestep {t}: expected 0 to {schedule.num_timesteps - 1}")
    for t, s in pairwise(timesteps):
        if s >= t:
            raise ValueError(f"timestep {s} follows {t}: expected strictly decreasing timesteps")
    alpha_bar, log_snr = schedule.alpha_bar.tolist(), schedule.log_snr.tolist()
    levels = [Level(t, math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t]), log_snr[t]) for t in timesteps]
    return [Step(number, t, s, schedule.posterior(t.t, s.t)) for number, (t, s) in enumerate(pairwise([*levels, DATA]))]


def _sampler(solve: Solver) -> Sampler:
    """Make a sampler of its algorithm."""

    def sample(
        denoise: Denoiser,
        x: Tensor,
        schedule: Schedule,
        timesteps: Sequence[int],
        options: Sampling = DEFAULTS,
    ) -> Tensor:
        def predict(x_t: Tensor, level: Level) -> Tensor:
            x_0 = torch.sub(x_t, denoise(x_t, level.t), alpha=level.noise) / level.signal
            return x_0 if options.threshold is None else options.threshold(x_0)

        trajectory = solve(x, _chain(schedule, timesteps), predict, options)
        for finished, state in enumerate(trajectory, start=1):
            x, x_0 = state
            if options.on_step is not None:
                options.on_step(finished, x_0)
        return x

    sample.__name__, sample.__doc__ = solve.__name__, solve.__doc__
    return sample


def _eps(x_0: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """The noise that makes x_t of an estimate of x_0. So a clipped estimate gets the noise that belongs to it."""
    return torch.sub(x_t, x_0, alpha=level.signal) / level.noise


def _ancestral(
    x: Tensor, steps: list[Step], predict: Predict, noise: StepNoise, variance: Callable[[Posterior], float]
) -> Trajectory:
    """Draw x_s from a normal with the mean of q(x_s | x_t, x_0) at the estimate of x_0 (Ho 2020, alg. 2)."""
    for number, t, s, q in steps:
        x_0 = predict(x, t)
        x = torch.add(q.x_t * x, x_0, alpha=q.x_0)  # eq. 7
        if s is not DATA:
            x = x + math.sqrt(variance(q)) * noise(number, x)
        yield x, x_0


@_sampler
def ddpm(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """Ancestral sampling with the posterior's variance beta-tilde (Ho 2020, eqs. 6-7): for any skipped timesteps."""
    return _ancestral(x, steps, predict, options.noise_for("ddpm"), lambda q: q.variance)


@_sampler
def ddpm_beta(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """Ancestral sampling with the variance beta of the step (Ho 2020, sec. 3.2): too much with few steps."""
    return _ancestral(x, steps, predict, options.noise_for("ddpm_beta"), lambda q: q.beta)


@_sampler
def ddim(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """DDIM (Song 2021, eq. 12): deterministic with eta = 0, the same as `ddpm` with eta = 1."""
    for number, t, s, q in steps:
        x_0 = predict(x, t)
        variance = options.eta**2 * q.variance  # eq. 16
        x = torch.add(s.signal * x_0, _eps(x_0, x, t), alpha=math.sqrt(max(s.noise**2 - variance, 0.0)))
        if variance > 0:
            x = x + math.sqrt(variance) * options.noise_for("ddim")(number, x)
        yield x, x_0


def _toward(x_0: Tensor, x: Tensor, t: Level, s: Level) -> Tensor:
    """Solve the ODE from x at t to s with x_0 held constant: DPM-Solver++ of first order (Lu 2022, prop. 4.1)."""
    h = s.log_snr - t.log_snr  # infinite on the way to the data, which leaves x_0 itself
    return torch.sub(s.noise / t.noise * x, x_0, alpha=s.signal * math.expm1(-h))


def _extrapolated(x_0: Tensor, h: float, last: tuple[Tensor, float] | None) -> Tensor:
    """The estimate of x_0 half a step h ahead, by `last`, the estimate and the width of the step before (alg. 2).

    It stays x_0, which makes the step one of first order, at the start and on the way to the data.
    """
    if last is None or h == math.inf:
        return x_0
    last_x_0, last_h = last
    return torch.lerp(last_x_0, x_0, 1 + h / (2 * last_h))


@_sampler
def dpmpp_2m(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """DPM-Solver++(2M), multistep, of second order (Lu 2022, alg. 2)."""
    last = None
    for _, t, s, _ in steps:
        x_0 = predict(x, t)
        h = s.log_snr - t.log_snr
        x = _toward(_extrapolated(x_0, h, last), x, t, s)
        last = x_0, h
        yield x, x_0


@_sampler
def dpmpp_2m_sde(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """SDE-DPM-Solver++(2M): the reverse SDE in the place of the ODE, otherwise as `dpmpp_2m` (Lu 2022)."""
    noise = options.noise_for("dpmpp_2m_sde")
    last = None
    for number, t, s, _ in steps:
        x_0 = predict(x, t)
        h = s.log_snr - t.log_snr
        ahead = _extrapolated(x_0, h, last)
        x = torch.sub(s.noise / t.noise * math.exp(-h) * x, ahead, alpha=s.signal * math.expm1(-2 * h))
        if s is not DATA:
            x = x + s.noise * math.sqrt(-math.expm1(-2 * h)) * noise(number, x)
        last = x_0, h
        yield x, x_0


@_sampler
def dpmpp_2s(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """DPM-Solver++(2S), singlestep, of second order (Lu 2022, alg. 1, with r from the list).

    Timesteps go in pairs, where a first-order step to the second one is only there to evaluate the network. Those that
    have no partner, or none but the data, are steps of first order: the last, and with an even number the last two.
    """
    start: tuple[Tensor, Level, Tensor] | None = None  # of the pair: x, its level, the estimate of x_0
    for _, t, s, _ in steps:
        x_0 = predict(x, t)
        if start is None or s is DATA:
            start = x, t, x_0
            x = _toward(x_0, x, t, s)
        else:
            x_u, u, x_0_u = start
            r = (t.log_snr - u.log_snr) / (s.log_snr - u.log_snr)
            x = _toward(x_0_u + (x_0 - x_0_u) / (2 * r), x_u, u, s)
            start = None
        yield x, x_0


@_sampler
def heun(x: Tensor, steps: list[Step], predict: Predict, options: Sampling) -> Trajectory:
    """Heun's method, of second order, for dz/dsigma = eps with z = x / signal (Karras 2022, alg. 1, sigma(t) = t).

    Each step asks the network at both of its ends; the last one, to sigma = 0, is Euler's, which gives x_0.
    """
    for _, t, s, _ in steps:
        x_0 = predict(x, t)
        if s is DATA:
            x = x_0
        else:
            z, eps, width = x / t.signal, _eps(x_0, x, t), s.sigma - t.sigma
            x_s = s.signal * (z + width * eps)
            x = s.signal * (z + width * (eps + _eps(predict(x_s, s), x_s, s)) / 2)
        yield x, x_0


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddpm_beta": ddpm_beta,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2s": dpmpp_2s,
    "heun": heun,
}


def network_evaluations(name: str, steps: int) -> int:
    """How often a sampler of `SAMPLERS` asks the denoiser in `steps` steps: the cost to compare samplers at."""
    return 2 * steps - 1 if name == "heun" else steps
