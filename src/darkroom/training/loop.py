"""Training a denoising UNet, from the first step or from wherever the last process was stopped."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.diffusion.objective import diffusion_loss
from darkroom.errors import Interrupted, StageFailed
from darkroom.params import TrainParams
from darkroom.randomness import Purpose, random_words
from darkroom.training import checkpoints
from darkroom.training.batches import BatchSource
from darkroom.training.ema import EMA

SAVE_COST = 0.01  # share of the time that checkpoints may take


@dataclass(frozen=True)
class Tick:
    """Means over the steps since the last tick. All but the speed is a function of the fingerprint."""

    step: int
    images: int
    loss: float
    grad_norm: float
    lr: float
    images_per_second: float  # of this process; 0 when nothing was trained since it started

    def history(self) -> dict[str, float]:
        """What is written to the training history: everything that repeats exactly."""
        row: dict[str, float] = {"step": self.step, "images": self.images}
        return row | {"loss": self.loss, "grad_norm": self.grad_norm, "lr": self.lr}


@dataclass(frozen=True)
class Trained:
    """Both sets of weights after the last step."""

    raw: nn.Module
    ema: nn.Module


def learning_rate(params: TrainParams, step: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant or a half cosine down to zero."""
    rate = params.learning_rate * min(1.0, (step + 1) / (params.lr_warmup_steps + 1))
    if params.lr_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / params.steps))
    return rate


def steps_per_tick(steps: int) -> int:
    """A hundred ticks for a short training, one every 100 steps for a long one."""
    return max(1, min(100, steps // 100))


def train(
    network: nn.Module,
    batches: BatchSource,
    params: TrainParams,
    directory: Path,
    fingerprint: str,
    *,
    on_tick: Callable[[Tick], None],
    on_resume: Callable[[int], None],
    save_every: float = 30.0,
) -> Trained:
    """Train `network` (on its device) for `params.steps` steps and return it with its EMA.

    Checkpoints go to `directory` at most every `save_every` seconds, more rarely if saving is slow. If it holds one,
    training starts there and `on_resume` gets its step; the result is the same to the last bit. SIGTERM or SIGINT
    finishes the step, saves and raises Interrupted. Raises StageFailed when the loss stops being finite.
    """
    device = next(network.parameters()).device
    ema = EMA(network, params.ema_decay)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    sums = torch.zeros(2, device=device)  # loss and gradient norm since the last tick; read only at a tick
    step = saved = 0
    checkpoint = checkpoints.load_newest(directory, fingerprint)
    if checkpoint is not None:
        _restore(checkpoint, network, ema, optimizer, sums)
        step = saved = checkpoint.step
        del checkpoint  # a second copy of all tensors
        on_resume(step)

    def save() -> float:
        started = time.monotonic()
        tensors = _snapshot(network, ema, optimizer, sums)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise StageFailed(_diverged(step, directory))
        checkpoints.save(directory, checkpoints.Checkpoint(step, tensors), fingerprint)
        return time.monotonic() - started

    per_tick = steps_per_tick(params.steps)
    tick_started, tick_first = time.monotonic(), step
    next_save = time.monotonic() + save_every
    network.train()
    with _stop_signals() as stop:
        while step < params.steps:
            rate = learning_rate(params, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if params.model.dropout > 0:  # the one consumer of torch's own generator
                high, low = random_words(params.seed, Purpose.DROPOUT, torch.tensor([step]), 2)[0].tolist()
                torch.manual_seed((high << 31) ^ low)

            batch = batches(step * params.batch_size, params.batch_size)
            with _autocast(params.precision, device):
                loss = diffusion_loss(network(batch.x_t, batch.t, batch.labels), batch.target, batch.weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            grad_norm = nn.utils.clip_grad_norm_(network.parameters(), params.gradient_clip)
            optimizer.step()
            step += 1
            ema.update(network, step)
            sums += torch.stack((loss.detach(), grad_norm))

            if step % per_tick == 0 or step == params.steps:
                count = per_tick if step % per_tick == 0 else step % per_tick
                mean_loss, mean_norm = (sums / count).tolist()
                if not math.isfinite(mean_loss + mean_norm):
                    raise StageFailed(_diverged(step, directory))
                seconds = time.monotonic() - tick_started
                speed = (step - tick_first) * params.batch_size / seconds
                on_tick(Tick(step, step * params.batch_size, mean_loss, mean_norm, rate, speed))
                sums.zero_()
                tick_started, tick_first = time.monotonic(), step
            if stop.is_set() and step < params.steps:
                save()
                raise Interrupted(f"stopped at step {step} of {params.steps}, state saved; the same command carries on")
            if time.monotonic() >= next_save and step < params.steps:
                next_save = time.monotonic() + max(save_every, save() / SAVE_COST)
        if saved < step:
            save()
    return Trained(network, ema.network)


def _diverged(step: int, directory: Path) -> str:
    return (
        f"the loss is not finite any more at step {step}; train.learning_rate may be too high."
        f" The last good checkpoint is kept in {directory}"
    )


def _autocast(precision: str, device: torch.device) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of what they did before. Only the main thread can have that."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _snapshot(network: nn.Module, ema: EMA, optimizer: torch.optim.AdamW, sums: Tensor) -> dict[str, Tensor]:
    """Everything that the next step depends on, flat and named."""
    tensors = {f"raw.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()} | {"sums": sums.clone()}


def _restore(
    checkpoint: checkpoints.Checkpoint, network: nn.Module, ema: EMA, optimizer: torch.optim.AdamW, sums: Tensor
) -> None:
    """The inverse of `_snapshot`."""
    tensors = checkpoint.tensors

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    network.load_state_dict(part("raw."))
    ema.network.load_state_dict(part("ema."))
    sums.copy_(tensors["sums"])
    for name, parameter in network.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"optimizer.{key}.{name}"].to(parameter.device, copy=True)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
