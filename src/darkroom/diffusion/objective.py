"""The training objective: noising, what the network predicts, and how much each timestep counts.

A network may predict the noise eps, the image x_0 or the velocity v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
(Salimans & Ho 2022, sec. 4). Given x_t each determines the others, but an error of the output grows differently:

- eps to x_0 multiplies it by sqrt((1 - alpha_bar) / alpha_bar), 20,291 at the end of the cosine schedule;
- x_0 to eps divides it by that, so it grows by 156 at the beginning;
- v to either never enlarges it.

The plain mean squared error also weighs timesteps by what is predicted: in terms of the error of x_0 it is SNR for eps,
1 for x_0 and SNR + 1 for v. `loss_weight` evens that out.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Prediction = Literal["eps", "x_0", "v"]
Weighting = Literal["simple", "min_snr"]


def add_noise(x_0: Tensor, eps: Tensor, alpha_bar: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, float32 (N, C, H, W) (Ho 2020, eq. 4).

    `alpha_bar` is the float64 table (T,) on the same device and `t` int64 (N,). The coefficients are computed in
    float64 and applied in float32: in bf16 the first timesteps would get no noise at all.
    """
    signal, noise = _amplitudes(alpha_bar[t], torch.float32)
    return signal * x_0.float() + noise * eps


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_class: int) -> Tensor:
    """Replace labels (N,) by the null class where `uniform` (N,) < `probability` (Ho & Salimans 2022, alg. 1)."""
    return torch.where(uniform < probability, null_class, labels)


def training_target(prediction: Prediction, x_0: Tensor, eps: Tensor, alpha_bar: Tensor, t: Tensor) -> Tensor:
    """What the network should answer for `add_noise` of the same arguments, of eps' shape and dtype."""
    if prediction == "eps":
        return eps
    if prediction == "x_0":
        return x_0
    signal, noise = _amplitudes(alpha_bar[t], eps.dtype)
    return signal * eps - noise * x_0


def to_eps(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The noise in x_t (N, C, H, W) that the network's `output` of the same shape stands for.

    `alpha_bar` is that of x_t's timestep: one float for all rows, or float64 (N,).
    """
    if prediction == "eps":
        return output
    signal, noise = _amplitudes(alpha_bar, x_t.dtype)
    return (x_t - signal * output) / noise if prediction == "x_0" else signal * output + noise * x_t


def to_x_0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The image in x_t (N, C, H, W) that the network's `output` stands for; arguments as for `to_eps`."""
    if prediction == "x_0":
        return output
    signal, noise = _amplitudes(alpha_bar, x_t.dtype)
    return (x_t - noise * output) / signal if prediction == "eps" else signal * x_t - noise * output


def loss_weight(
    weighting: Weighting, prediction: Prediction, alpha_bar: Tensor, t: Tensor, gamma: float = 5.0
) -> Tensor | None:
    """Weights of the samples' losses, float32 (N,), for timesteps `t` int64 (N,); None where all are 1.

    min_snr weighs the squared error of x_0 by min(SNR, gamma), whatever is predicted (Min-SNR-gamma, Hang 2023). The
    squared errors of eps and v are larger by SNR and SNR + 1, which their weights divide out.
    """
    if weighting == "simple":
        return None
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    scale = {"eps": snr, "x_0": torch.ones_like(snr), "v": snr + 1}[prediction]
    return (snr.clamp(max=gamma) / scale).float()


def diffusion_loss(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared error over batch, channels and pixels; a float32 scalar (Ho 2020, eq. 14).

    `output` and `target` are (N, C, H, W), `weight` is (N,) or None for 1. Weights are not normalised, so that the loss
    of a batch is the mean of those of its parts.
    """
    if weight is None:
        return F.mse_loss(output.float(), target)
    return (weight * (output.float() - target).square().flatten(1).mean(dim=1)).mean()


def _amplitudes(alpha_bar: Tensor | float, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), computed in float64, ready to multiply (N, C, H, W) of `dtype`."""
    if isinstance(alpha_bar, float):
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    a = alpha_bar.reshape(-1, 1, 1, 1)
    return a.sqrt().to(dtype), (1 - a).sqrt().to(dtype)
