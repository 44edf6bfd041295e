"""In which form a network trains fastest on a GPU: found by trying, and taken only if the losses stay the same.

What torch.compile makes of a network, and what channels-last memory does to it, depends on device and versions;
compiled GroupNorm has also been seen to learn worse. So a long training begins with a few steps of each variant on
copies. The choice is kept beside the checkpoints: another one rounds differently, and a resumed training should not.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from darkroom.files import read_json, write_json

FILE = "kernels.json"  # in the checkpoint directory
WORTHWHILE = 900.0  # seconds of training from which on trying pays: compiling takes a minute or two
STEPS = 16  # of each variant; the second half is timed
PARITY = 0.01  # how much the mean loss may differ from that of the plain network
GRADIENT_PARITY = 0.1  # how much a gradient may, relative to its norm: bf16 alone makes 0.01 to 0.03
_log = logging.getLogger(__name__)

# (network, steps) -> the losses of as many training steps of it; the last gradients stay in its parameters
Trial = Callable[[nn.Module, int], list[Tensor]]


@dataclass(frozen=True)
class Variant:
    """A form of the same network."""

    compiled: bool = False
    channels_last: bool = False

    def apply(self, network: nn.Module) -> None:
        """Bring `network` into this form, in place."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            network.compile(dynamic=False)

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'}{', channels last' if self.channels_last else ''}"


PLAIN = Variant()
VARIANTS = (PLAIN, Variant(channels_last=True), Variant(compiled=True), Variant(compiled=True, channels_last=True))


def choose(network: nn.Module, trial: Trial, steps: int, directory: Path, device: torch.device) -> Variant:
    """The fastest of `VARIANTS` for a training of `steps` steps that still lie ahead; `network` is left as it is.

    A choice that was made in `directory` before, on the same kind of device and with the same torch, holds. On a CPU,
    and for a training too short to win back the time, it is the plain network.
    """
    if device.type != "cuda":
        return PLAIN
    place = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    known = _read(directory / FILE, place)
    if known is not None:
        return known
    variant = fastest(network, trial, steps, lambda: torch.cuda.synchronize(device))
    write_json(directory / FILE, place | asdict(variant))
    _log.info("the network trains %s (chosen by trying; %s keeps the choice)", variant, directory / FILE)
    return variant


def fastest(network: nn.Module, trial: Trial, steps: int, wait: Callable[[], None]) -> Variant:
    """The fastest variant that learns like the plain network; one that raises, for want of a compiler, is out.

    `wait` returns when the device has nothing to do.
    """
    start = _awake(network)
    plain = _measure(PLAIN, start, trial, wait)
    best, seconds = PLAIN, plain.seconds
    if seconds * steps < WORTHWHILE:
        return PLAIN
    for variant in VARIANTS[1:]:
        try:
            found = _measure(variant, start, trial, wait)
        except Exception as error:
            _log.info("%s: does not work here: %s", variant, " ".join(str(error).split())[:200])
            continue
        finally:
            torch.compiler.reset()
        loss = abs(found.loss / plain.loss - 1)
        gradient = float((found.gradient - plain.gradient).norm() / plain.gradient.norm())
        _log.info("%s: %.3g s a step; loss differs by %.2g, gradient by %.2g", variant, found.seconds, loss, gradient)
        if loss <= PARITY and gradient <= GRADIENT_PARITY and found.seconds < seconds:
            best, seconds = variant, found.seconds
    return best


@dataclass(frozen=True)
class _Measured:
    seconds: float  # of a step
    loss: float  # mean over the trial
    gradient: Tensor  # of the first step, flat


def _awake(network: nn.Module) -> nn.Module:
    """A copy whose layers that start at zero do not, so that every layer has a gradient to compare."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def _measure(variant: Variant, network: nn.Module, trial: Trial, wait: Callable[[], None]) -> _Measured:
    network = copy.deepcopy(network)
    variant.apply(network)
    losses = trial(network, 1)
    gradient = torch.cat([p.grad.detach().flatten() for p in network.parameters() if p.grad is not None]).clone()
    losses += trial(network, STEPS // 2)
    wait()
    started = time.perf_counter()
    losses += trial(network, STEPS // 2)
    wait()
    return _Measured((time.perf_counter() - started) / (STEPS // 2), float(torch.stack(losses).mean()), gradient)


def _read(path: Path, place: dict[str, str]) -> Variant | None:
    try:
        found = read_json(path)
        if all(found[key] == value for key, value in place.items()):
            return Variant(bool(found["compiled"]), bool(found["channels_last"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
