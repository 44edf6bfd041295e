"""Classifier-free guidance (Ho & Salimans 2022), in one convention everywhere.

`guidance_scale` s mixes eps = eps_u + s (eps_c - eps_u): s = 1 is the conditional model, s = 0 the unconditional one.
The w of the paper, (1 + w) eps_c - w eps_u, is s - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from darkroom.diffusion.objective import EpsModel

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t (N, C, H, W), t (N,)) -> eps of x_t's shape


def guided(model: EpsModel, labels: Tensor, guidance_scale: float, null_class: int | None) -> Denoiser:
    """A denoiser for `labels` int64 (N,). Both halves go through the network as one batch of 2N.

    Raises ValueError for s != 1 on a model without null class.
    """
    if guidance_scale == 1:
        return lambda x_t, t: model(x_t, t, labels)
    if null_class is None:
        raise ValueError(f"guidance_scale = {guidance_scale}: this model has no null class, only 1 is possible")
    null = torch.full_like(labels, null_class)
    if guidance_scale == 0:
        return lambda x_t, t: model(x_t, t, null)
    both = torch.cat((labels, null))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        eps_c, eps_u = model(torch.cat((x_t, x_t)), torch.cat((t, t)), both).chunk(2)
        return eps_u + guidance_scale * (eps_c - eps_u)

    return denoise
