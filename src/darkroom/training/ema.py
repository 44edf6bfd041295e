"""The exponential moving average of the weights, which is what samples are drawn from."""

import copy

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """The decay used after optimizer step `step` (from 1): warm-up by (1 + step) / (10 + step), then `decay`.

    Without the warm-up the random initial weights would stay in the average: with 0.9999, 37 % after 10,000 steps.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """A float32 copy of a network whose parameters follow by averaging; buffers are copied, never averaged."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """ema <- d ema + (1 - d) weights, after optimizer step `step` (from 1)."""
        mine: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay_at(step, self.decay))
        for own, other in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(other)
