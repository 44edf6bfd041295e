"""A trajectory of weights that is remembered, so that any average of it can be taken by brute force."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from darkroom.training.ema import PowerEMA, gamma_of

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


def make_network() -> nn.Module:
    """Parameters far from zero, and buffers of two types."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 20)
    return network


def walk(
    network: nn.Module, ema: PowerEMA, steps: int, *, first: int = 1, after: Callable[[int], None] = lambda step: None
) -> list[Tensor]:
    """Random steps `first` to `steps`, averaged; the weights after each, float64 (P,). Step t is a function of t."""
    trajectory = []
    for step in range(first, steps + 1):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device))
            network[1].running_mean.add_(1)
            network[1].num_batches_tracked.add_(1)
        ema.update(network, step)
        trajectory.append(flat(dict(network.named_parameters())))
        after(step)
    return trajectory


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """The parameters as one vector, float64."""
    return torch.cat([tensors[name].detach().double().cpu().flatten() for name in NAMES])


def average(trajectory: list[Tensor], width: float) -> Tensor:
    """The power-function average after the last of `trajectory`, by its definition: a sum over all steps."""
    edges = (torch.arange(len(trajectory) + 1, dtype=torch.float64) / len(trajectory)) ** (gamma_of(width) + 1)
    return edges.diff() @ torch.stack(trajectory)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
