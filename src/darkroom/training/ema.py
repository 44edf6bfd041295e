"""Exponential moving averages of the weights, which are what samples are drawn from.

`EMA` has one decay, chosen before training. `PowerEMA` has the power-function averages of Karras et al. 2024
(arXiv 2312.02696, section 3.1): their width grows with training, and from snapshots of two of them `posthoc` makes the
average of any other width after training.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.errors import InputError

DEFAULT_WIDTHS = (0.05, 0.10)  # the pair that Karras et al. store (section 3.2)
MAX_WIDTH = 0.25  # the uniform average, gamma = 0, has 0.289


def decay_at(step: int, decay: float) -> float:
    """The decay used after optimizer step `step` (from 1): warm-up by (1 + step) / (10 + step), then `decay`.

    Without the warm-up the random initial weights would stay in the average: with 0.9999, 37 % after 10,000 steps.
    """
    return min(decay, (1 + step) / (10 + step))


def check_width(width: float) -> None:
    """Raise InputError unless `width` is one that a power-function average can sensibly have."""
    if not 0 < width <= MAX_WIDTH:
        raise InputError(f"EMA width {width}: expected more than 0 and at most {MAX_WIDTH}")


def width_name(width: float) -> str:
    """How a width is written in names: with three decimals, or with as many more as it has."""
    return f"{width:.3f}" if float(f"{width:.3f}") == width else repr(width)


def gamma_of(width: float) -> float:
    """The exponent of the profile tau^gamma whose standard deviation is `width` of the training's length.

    Solves width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, a cubic, for its largest root (eq. 126 and algorithm 2 of the
    paper). Widths 0.05 and 0.10 have 16.97 and 6.94. Raises InputError as `check_width` does.
    """
    check_width(width)
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(step: int, gamma: float) -> float:
    """beta(t) = (1 - 1/t)^(gamma + 1) after optimizer step t (from 1); 0 at step 1, which forgets what was before."""
    return float((1 - 1 / step) ** (gamma + 1))


class EMA:
    """A float32 copy of a network whose parameters follow by averaging; buffers are copied, never averaged."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = _copy(network)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """ema <- d ema + (1 - d) weights, after optimizer step `step` (from 1)."""
        _follow(self.network, network, decay_at(step, self.decay))


class PowerEMA:
    """Float32 copies of a network, one for each width, that follow by power-function averaging (eq. 127).

    After step t the average of width w weighs the weights of step tau by tau^(g+1) - (tau-1)^(g+1) over t^(g+1),
    g = `gamma_of(w)`: it starts with the weights of step 1, and those before it have no part. Widths are standard
    deviations in units of t. Raises InputError for a width that is out of range or given twice.
    """

    def __init__(self, network: nn.Module, widths: Sequence[float] = DEFAULT_WIDTHS) -> None:
        if len(set(widths)) < len(widths):
            raise InputError(f"EMA widths {', '.join(map(width_name, widths))}: expected each once")
        self.gammas = {width: gamma_of(width) for width in widths}
        self.networks = {width: _copy(network) for width in widths}

    @property
    def widths(self) -> list[float]:
        return list(self.networks)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """ema <- beta(t) ema + (1 - beta(t)) weights, after optimizer step t = `step` (from 1). Waits for no GPU."""
        for width, average in self.networks.items():
            _follow(average, network, power_decay(step, self.gammas[width]))

    def tensors(self) -> dict[str, Tensor]:
        """The state, on its device and not copied: "power.<width>.<name in the network>" -> tensor."""
        return {
            f"{_prefix(width)}{name}": tensor
            for width, average in self.networks.items()
            for name, tensor in average.state_dict().items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the state from what `tensors` returned, among others or alone. RuntimeError if a part is missing."""
        for width, average in self.networks.items():
            prefix = _prefix(width)
            average.load_state_dict(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            )


def _prefix(width: float) -> str:
    return f"power.{width_name(width)}."


def _copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(False).eval()


def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    mine: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(network.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - decay)
    for own, other in zip(average.buffers(), network.buffers(), strict=True):
        own.copy_(other)
