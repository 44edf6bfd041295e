"""Classifier-free guidance (Ho & Salimans 2022), in one convention everywhere.

`guidance_scale` s mixes eps = eps_u + s (eps_c - eps_u): s = 1 is the conditional model, s = 0 the unconditional one.
The w of the paper, (1 + w) eps_c - w eps_u, is s - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, int, Tensor], Tensor]  # (x_t (R, C, H, W), t of all rows, labels int64 (R,)) -> eps
Denoiser = Callable[[Tensor, int], Tensor]  # (x_t (N, C, H, W), t) -> eps of x_t's shape


def guided(
    network: Network,
    labels: Tensor,
    guidance_scale: float | Tensor,
    null_class: int | None,
    *,
    sigma: Tensor | None = None,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """A denoiser for `labels` int64 (N,); `guidance_scale` is one number, or one for each sample (N,).

    Each evaluation is one call of the network, with the conditional and the unconditional half in one batch. A sample
    with s = 1 or s = 0 has only the half it needs computed; which those are is decided here, once. With an `interval`
    (lo, hi) the scale holds where lo < sigma_t <= hi, and s = 1 elsewhere (Kynkäänniemi 2024); `sigma` is then the
    noise level of each timestep, `Schedule.sigma`.

    Raises ValueError for a scale that is negative or not finite, for s != 1 on a model without null class, and for an
    interval that is not 0 <= lo < hi or comes without sigma.
    """
    scales = _checked_scales(guidance_scale, len(labels), null_class)

    def conditional(x_t: Tensor, t: int) -> Tensor:
        return network(x_t, t, labels)

    mixed: Denoiser = conditional
    if null_class is not None and bool((scales != 1).any()):
        mixed = _mixed(network, labels, scales, null_class)
    if interval is None:
        return mixed

    lo, hi = interval
    if not 0 <= lo < hi:
        raise ValueError(f"guidance interval {lo} to {hi}: expected 0 <= lo < hi, as noise levels sigma")
    if sigma is None:
        raise ValueError(f"guidance interval {lo} to {hi}: expected the schedule's sigma with it, got None")
    inside = ((sigma > lo) & (sigma <= hi)).tolist()
    return lambda x_t, t: (mixed if inside[t] else conditional)(x_t, t)


def _checked_scales(guidance_scale: float | Tensor, num_samples: int, null_class: int | None) -> Tensor:
    """One scale per sample, float64 (N,) on the CPU. Raises ValueError as in `guided`."""
    scales = torch.as_tensor(guidance_scale, dtype=torch.float64, device="cpu")
    if scales.ndim > 0 and scales.shape != (num_samples,):
        raise ValueError(f"guidance_scale of shape {tuple(scales.shape)}: expected one number or ({num_samples},)")
    for scale in scales.reshape(-1).tolist():
        if not 0 <= scale < float("inf"):
            raise ValueError(f"guidance_scale = {scale}: expected 0 or more")
        if scale != 1 and null_class is None:
            raise ValueError(f"guidance_scale = {scale}: this model has no null class, only 1 is possible")
    return scales.expand(num_samples)


def _mixed(network: Network, labels: Tensor, scales: Tensor, null_class: int) -> Denoiser:
    """eps_u + s (eps_c - eps_u) in one call, on as few rows as the scales need."""
    asks_c, asks_u = scales != 0, scales != 1
    rows = torch.cat((asks_c.nonzero(), asks_u.nonzero())).flatten()  # of x_t: first all conditional ones
    conditional = torch.arange(len(rows)) < asks_c.sum()
    # Where the halves of each sample come back. A half that is not asked for is replaced by the other one: their
    # difference is then exactly 0, which leaves s = 1 and s = 0 what the network returned, to the last bit.
    at_c, at_u = asks_c.cumsum(0) - 1, asks_c.sum() + asks_u.cumsum(0) - 1
    at_c, at_u = torch.where(asks_c, at_c, at_u), torch.where(asks_u, at_u, at_c)

    device = labels.device
    rows, at_c, at_u, s = rows.to(device), at_c.to(device), at_u.to(device), scales.reshape(-1, 1, 1, 1).to(device)
    asked = torch.where(conditional.to(device), labels[rows], null_class)

    def denoise(x_t: Tensor, t: int) -> Tensor:
        eps = network(x_t[rows], t, asked)
        eps_c, eps_u = eps[at_c], eps[at_u]
        return eps_u + s.to(eps.dtype) * (eps_c - eps_u)

    return denoise
