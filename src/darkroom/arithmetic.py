"""In which arithmetic a device computes fastest: measured on it, never read from a list of names.

A processor without bf16 instructions emulates them: the same convolution takes about twenty times as long as in fp32.
There, and on a GPU from before Ampere, what asks for bf16 computes in fp32. `python -m darkroom.arithmetic` prints what
it finds.
"""

import logging
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = TypeVar("Precision", bound=Literal["fp32", "tf32", "bf16"])

WORTHWHILE = 1.1  # times as fast as fp32 that bf16 has to be, so that noise does not decide
_RUNS = 5  # of each arithmetic, in turn; the fastest counts
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """Seconds that the same work takes on a device."""

    name: str  # of the device
    fp32: float
    bf16: float

    @property
    def bf16_is_faster(self) -> bool:
        return self.fp32 >= WORTHWHILE * self.bf16

    def __str__(self) -> str:
        """The two times, with their unit."""
        return f"the same work takes {self.bf16 * 1e3:.3g} ms in bf16, {self.fp32 * 1e3:.3g} ms in fp32"


def precision_on(device: torch.device, asked: Precision) -> Precision | Literal["fp32"]:
    """The arithmetic to compute in on `device`: what was asked for, or fp32 where bf16 is no faster.

    The device is measured once in a process, in well under a second, and the first bf16 that becomes fp32 is logged.
    """
    if asked != "bf16" or speed(device).bf16_is_faster:
        return asked
    _log_once(f"{speed(device).name} has no fast bf16: computing in fp32 ({speed(device)})")
    return "fp32"


@cache
def speed(device: torch.device) -> Speed:
    """A convolution with its gradients on a processor, a large matrix product on a GPU, in both arithmetics."""
    work, clock = (_product, _device_time) if device.type == "cuda" else (_convolution, time.thread_time)
    threads = torch.get_num_threads()
    best: dict[torch.dtype, float] = {}
    try:
        if device.type == "cpu":  # one thread, by the time that it computes: other work on the machine does not count
            torch.set_num_threads(1)
        for run in range(_RUNS + 1):
            for dtype in (torch.float32, torch.bfloat16):
                started = clock()
                work(device, dtype)
                taken = clock() - started
                if run:  # the first one sets libraries up
                    best[dtype] = min(taken, best.get(dtype, taken))
    finally:
        torch.set_num_threads(threads)
    return Speed(_name(device), best[torch.float32], best[torch.bfloat16])


@torch.enable_grad()
def _convolution(device: torch.device, dtype: torch.dtype) -> None:
    with torch.inference_mode(False):
        x = torch.full((16, 64, 8, 8), 0.5, device=device, dtype=dtype, requires_grad=True)
        weight = torch.full((64, 64, 3, 3), 0.01, device=device, dtype=dtype, requires_grad=True)
        out = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(out, (x, weight), torch.ones_like(out))


def _product(device: torch.device, dtype: torch.dtype) -> Tensor:
    side = 4096
    a = torch.full((side, side), 0.01, device=device, dtype=dtype)
    return a @ a


def _device_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"


@cache
def _log_once(line: str) -> None:
    _log.info("%s", line)


if __name__ == "__main__":
    from darkroom.device import choose_device

    found = speed(choose_device())
    print(f"{found.name}: {found}; a bf16 recipe computes in {'bf16' if found.bf16_is_faster else 'fp32'}")
