"""Training a denoising UNet, from the first step or from wherever the last process was stopped.

Step k of batch size B is about the global samples k B … k B + B - 1. It goes through them in micro-batches of
`micro_batch` images on each rank, averages the gradients, and makes one update, the same on every rank.
"""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.arithmetic import precision_on, speed
from darkroom.diffusion.objective import diffusion_loss
from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.params import TrainParams
from darkroom.randomness import Purpose, random_words
from darkroom.training import checkpoints, kernels
from darkroom.training.batches import BatchSource
from darkroom.training.distributed import Ranks, accumulating, wrap
from darkroom.training.ema import DEFAULT_WIDTHS
from darkroom.training.mirroring import Mirror
from darkroom.training.snapshots import missing_snapshots, snapshot_steps, write_snapshot
from darkroom.training.state import IN_BF16, TrainingState
from darkroom.training.ticks import Meter, Tick, steps_per_tick, training_flops

PATIENCE = 20  # updates that may be skipped in a row
_GO_ON, _SAVE, _STOP = range(3)  # what a rank wishes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saving:
    """When and where checkpoints are written, beside the end of the training; a matter of the machine."""

    every_seconds: float = 30.0
    every_steps: int | None = None
    cost: float = checkpoints.SAVE_COST  # share of the time that saving may take
    mirror: Mirror | None = None


@dataclass(frozen=True)
class Trained:
    """Both sets of weights after the last step."""

    raw: nn.Module
    ema: nn.Module
    precision: str  # that its last steps were computed in


def learning_rate(params: TrainParams, step: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant or a half cosine down to zero."""
    rate = params.learning_rate * min(1.0, (step + 1) / (params.lr_warmup_steps + 1))
    if params.lr_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / params.steps))
    return rate


def train(
    network: nn.Module,
    batches: BatchSource,
    params: TrainParams,
    directory: Path,
    fingerprint: str,
    *,
    on_tick: Callable[[Tick], None],
    on_resume: Callable[[int], None],
    on_step: Callable[[int], None] = lambda step: None,
    ranks: Ranks | None = None,
    micro_batch: int | None = None,
    saving: Saving | None = None,
) -> Trained:
    """Train `network` (on its device) for `params.steps` steps and return it with its EMA.

    If `directory` holds a checkpoint, training starts there and `on_resume` gets its step; the result is the same to
    the last bit. `on_step` gets the steps that are done before the first step and after each; a GPU may still be at
    it. SIGTERM or SIGINT finishes the step, saves and raises Interrupted. Every rank has to call this; rank
    0 alone reads and writes `directory`. `micro_batch` images of a batch are computed at once on each rank, by default
    all that it has. A training that asks for bf16 on a device where fp32 is as fast starts in fp32; one that is resumed
    keeps to the arithmetic that it began in, wherever it is.

    Raises StageFailed when loss or gradients stay not finite or when what has to be written cannot be, and InputError
    for a batch that cannot be divided as asked.
    """
    ranks, saving = ranks or Ranks(), saving or Saving()
    found = checkpoints.load_newest(directory, fingerprint) if ranks.is_first else None
    params = params.model_copy(update={"precision": _precision(params, found, batches.images.device, ranks)})
    work = _Work.divide(batches, params, ranks, micro_batch)
    with (
        _arithmetic(params.precision, work.device),
        closing(checkpoints.Saver(directory, fingerprint, mirror=saving.mirror)) as saver,
    ):
        flops = work.flops(network)  # before it may be compiled
        state, first = _start(network, work, directory, found)
        found, step = None, first  # without a second copy of all tensors
        if step:
            on_resume(step)
        model = wrap(state.network.train(), work.device, ranks)
        if ranks.count > 1 and step < params.steps:
            work.gradients(model, step)  # for nothing: after it DDP sums in another order, which it then keeps
        meter, losses = Meter(params, work.device, step, flops, ranks.count), deque[str](maxlen=5)
        snapshots = snapshot_steps(params.steps, params.ema_snapshots)
        schedule = checkpoints.Schedule(step, time.monotonic(), saving.every_seconds, saving.every_steps, saving.cost)

        def save(*, wait: bool) -> None:
            started, tensors = time.monotonic(), state.tensors()
            ranks.check_equal(tensors, "the training states")
            if ranks.is_first:
                saver.save(step, tensors, wait=wait)
            schedule.saved(step, time.monotonic(), time.monotonic() - started)

        with _stop_signals() as stop:
            on_step(step)
            while step < params.steps:
                rate = learning_rate(params, step)
                loss = work.gradients(model, step)
                step += 1
                state.update(step, rate, loss, params.gradient_clip)

                if step % steps_per_tick(params.steps) == 0 or step == params.steps:
                    tick = meter.tick(step, rate, state.sums)
                    losses.append(f"{tick.loss:.4g} at step {step}")
                    on_tick(tick)
                    skipped = int(state.skipped_in_a_row)
                    if skipped >= min(PATIENCE, params.steps):
                        raise StageFailed(_diverged(skipped, step, losses, directory))
                    state.sums.zero_()
                on_step(step)
                if state.power and step in snapshots and ranks.is_first:
                    write_snapshot(directory, step, state.power, fingerprint)
                if step < params.steps:
                    due = ranks.is_first and schedule.due(step, time.monotonic())
                    wish = ranks.agree(_STOP if stop.is_set() else _SAVE if due else _GO_ON)
                    if wish != _GO_ON:
                        save(wait=wish == _STOP)
                    if wish == _STOP:
                        raise Interrupted(
                            f"stopped at step {step} of {params.steps}, state saved; the same command carries on"
                        )
            if step > first:
                save(wait=True)
    return Trained(state.network, state.ema.network, params.precision)


@dataclass(frozen=True)
class _Work:
    """What one step consists of, on this rank."""

    batches: BatchSource
    params: TrainParams
    ranks: Ranks
    size: int  # images that all ranks together compute at once

    @classmethod
    def divide(cls, batches: BatchSource, params: TrainParams, ranks: Ranks, micro_batch: int | None) -> "_Work":
        """Raises InputError if ranks and micro-batches do not divide the batch."""
        ranks.part(params.batch_size)
        size = params.batch_size if micro_batch is None else min(micro_batch * ranks.count, params.batch_size)
        if params.batch_size % size:
            each = f"{micro_batch} images" + (f" on each of {ranks.count} ranks" if ranks.count > 1 else "")
            raise InputError(f"DARKROOM_MICRO_BATCH: {each} does not divide train.batch_size = {params.batch_size}")
        return cls(batches, params, ranks, size)

    @property
    def device(self) -> torch.device:
        return self.batches.images.device

    def gradients(self, model: nn.Module, step: int) -> Tensor:
        """Leave the gradients of the batch of `step` (from 0), equal on all ranks; return its mean loss, float32 ()."""
        model.zero_grad(set_to_none=True)
        part, losses = self.ranks.part(self.size), []
        first, end = step * self.params.batch_size, (step + 1) * self.params.batch_size
        for start in range(first, end, self.size):
            batch = self.batches(start + part.start, part.stop - part.start)
            if self.params.model.dropout > 0:  # the one consumer of torch's own generator
                _seed_dropout(self.params.seed, start + part.start)
            with accumulating(model, last=start + self.size == end):
                with _autocast(self.params.precision, self.device):
                    output = model(batch.x_t, batch.t, batch.labels)
                loss = diffusion_loss(output, batch.target, batch.weight) * (self.size / self.params.batch_size)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return self.ranks.sum(torch.stack(losses).sum() / self.ranks.count)

    def flops(self, network: nn.Module) -> float:
        """Operations that one image takes, where there is a peak to compare with; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        one = self.batches(0, 1)
        return training_flops(network, one.x_t, one.t, one.labels)

    def trial(self, network: nn.Module, steps: int) -> list[Tensor]:
        """Train a copy on this rank's micro-batches alone, from the first step and without warm-up; the losses."""
        changes = {"batch_size": self.size // self.ranks.count, "ema_snapshots": 0, "lr_warmup_steps": 0}
        params = self.params.model_copy(update=changes)
        alone = replace(self, params=params, ranks=Ranks(), size=params.batch_size)
        state, losses = TrainingState(network.train(), params), []
        for step in range(steps):
            losses.append(alone.gradients(network, step))
            state.update(step + 1, learning_rate(params, step), losses[-1], params.gradient_clip)
        return losses


def _precision(
    params: TrainParams, found: checkpoints.Checkpoint | None, device: torch.device, ranks: Ranks
) -> Literal["fp32", "tf32", "bf16"]:
    """What to compute in, the same on all ranks: as the training began, or what is fastest on the first rank's device.

    A resumed training repeats the unbroken one to the last bit, so another device does not change its arithmetic.
    """
    if params.precision != "bf16":
        return params.precision
    in_bf16 = False
    if ranks.is_first and found is None:
        in_bf16 = precision_on(device, params.precision) == "bf16"
    elif ranks.is_first and found is not None:
        in_bf16 = bool(found.tensors[IN_BF16])
        if in_bf16 != speed(device).bf16_is_faster:
            kept, other = ("bf16", "fp32") if in_bf16 else ("fp32", "bf16")
            _log.info(
                "this training began in %s and goes on in it; on %s %s is faster", kept, speed(device).name, other
            )
    return "bf16" if ranks.agree(int(in_bf16), patient=True) else "fp32"


def _start(
    network: nn.Module, work: _Work, directory: Path, found: checkpoints.Checkpoint | None
) -> tuple[TrainingState, int]:
    """The state to go on from and its step, the same on all ranks: rank 0 has `found` it."""
    params, ranks = work.params, work.ranks
    step, variant = ranks.agree(found.step if found else 0, patient=True), kernels.PLAIN
    if ranks.is_first:
        past = [past for past in snapshot_steps(params.steps, params.ema_snapshots) if past <= step]
        if missing := missing_snapshots(directory, past, DEFAULT_WIDTHS):
            raise StageFailed(f"{directory} lacks {', '.join(missing)}; remove it to train again from the first step")
        parts = (params.steps - step) * (params.batch_size // work.size)
        variant = kernels.choose(network, work.trial, parts, directory, work.device)
    kernels.VARIANTS[ranks.agree(kernels.VARIANTS.index(variant), patient=True)].apply(network)
    state = TrainingState(network, params)
    if found:
        state.load(found.tensors)
    if step:
        ranks.broadcast(state.tensors().values())
    return state, step


def _diverged(skipped: int, step: int, losses: Iterable[str], directory: Path) -> str:
    return (
        f"loss or gradients were not finite for {skipped} updates in a row up to step {step}, which were skipped;"
        f" train.learning_rate may be too high. Mean losses: {', '.join(losses)}. The last good checkpoint is kept in"
        f" {directory}"
    )


def _seed_dropout(seed: int, sample: int) -> None:
    high, low = random_words(seed, Purpose.DROPOUT, torch.tensor([sample]), 2)[0].tolist()
    torch.manual_seed((high << 31) ^ low)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def _arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """On a GPU: round the factors of fp32 products to TF32 exactly when `precision` is tf32, and repeat all bits.

    Attention's backward pass adds up in any order unless that is an error, which a warning is not enough for.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, torch.get_deterministic_debug_mode()
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
        torch.set_deterministic_debug_mode(before[2])


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
