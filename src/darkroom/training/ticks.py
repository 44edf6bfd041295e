"""What a training says of itself while it runs."""

import math
import resource
import sys
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from darkroom.params import TrainParams

# What of a tick is a function of the fingerprint; the rest another machine, or another hour, does not repeat.
REPEATABLE = ("step", "images", "loss", "grad_norm", "lr", "skipped")


@dataclass(frozen=True)
class Tick:
    """Means over the steps since the last tick, without those whose update was skipped."""

    step: int
    images: int
    loss: float  # NaN if every update was skipped
    grad_norm: float  # before clipping
    lr: float
    skipped: int  # updates, because loss or gradient was not finite
    images_per_second: float  # of all ranks
    memory: int  # bytes: the most so far, of this GPU or of this process
    mfu: float | None  # share of the peak of the GPUs' matrix units; None on a CPU

    def row(self) -> dict[str, float | None]:
        """The tick as a JSON object; None stands for what is not a number."""
        return {key: value if value is None or math.isfinite(value) else None for key, value in asdict(self).items()}

    def __str__(self) -> str:
        """The tick for people."""
        words = f"loss {self.loss:.4f}  gradient {self.grad_norm:.3g}  rate {self.lr:.2g}"
        words += f"  {self.images_per_second:.0f} images/s  {self.memory / 2**30:.1f} GiB"
        if self.mfu is not None:
            words += f"  {self.mfu:.0%} of peak"
        return words + (f"  {self.skipped} updates skipped" if self.skipped else "")


class Meter:
    """Makes ticks from the sums on the device, which it reads; until then nothing waits."""

    def __init__(
        self, params: TrainParams, device: torch.device, step: int, flops_per_image: float, ranks: int
    ) -> None:
        """Starts to measure after `step` steps; `flops_per_image` is 0 where no share of peak is asked for."""
        self._params, self._device = params, device
        self._flops = flops_per_image / ranks  # that this one's device has to do
        self._peak = peak_flops(params.precision, device) if flops_per_image else 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._started, self._first = time.monotonic(), step

    def tick(self, step: int, lr: float, sums: Tensor) -> Tick:
        """The tick after `step` steps; `sums` (3,) are those of loss, gradient norm and skipped updates."""
        loss, grad_norm, skipped = sums.tolist()
        count = step % steps_per_tick(self._params.steps) or steps_per_tick(self._params.steps)
        good = count - int(skipped)
        now = time.monotonic()
        speed = (step - self._first) * self._params.batch_size / (now - self._started)
        self._started, self._first = now, step
        return Tick(
            step=step,
            images=step * self._params.batch_size,
            loss=loss / good if good else math.nan,
            grad_norm=grad_norm / good if good else math.nan,
            lr=lr,
            skipped=int(skipped),
            images_per_second=speed,
            memory=_memory(self._device),
            mfu=speed * self._flops / self._peak if self._peak else None,
        )


def steps_per_tick(steps: int) -> int:
    """A hundred ticks for a short training, one every 100 steps for a long one."""
    return max(1, min(100, steps // 100))


def training_flops(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> float:
    """Floating-point operations of one image's share of a training step: three forward passes, as is usual to count."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x_t[:1], t[:1], labels[:1])
    return 3.0 * int(counter.get_total_flops())


def peak_flops(precision: str, device: torch.device, side: int = 8192, repeats: int = 20) -> float:
    """Operations a second in large matrix products, in the arithmetic of `precision`: measured in well under a second.

    The share of it that a training reaches can be compared between devices, and needs no table of data sheets.
    """
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    a @ a
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        a @ a
    torch.cuda.synchronize(device)
    return 2.0 * side**3 * repeats / (time.perf_counter() - started)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
