"""Checkpoints that are whole or not there: tensors as safetensors, and a JSON, written last, that vouches for them.

The directory belongs to one training fingerprint, lies outside DVC's outputs (DVC deletes outputs before a stage runs),
and is locked by the process that trains in it.
"""

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from darkroom.errors import StageFailed
from darkroom.files import digest_file, read_json, replacing, write_json
from darkroom.training.hostcopy import HostCopy
from darkroom.training.mirroring import Mirror, Mirroring

KEEP = 2
SAVE_COST = 0.01  # share of the time that checkpoints may take from the training
_PROBE = 1 << 20  # bytes that a usable directory must take
_log = logging.getLogger(__name__)
_locks: set[IO[bytes]] = set()


@dataclass(frozen=True)
class Checkpoint:
    """The complete state after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the training directory; the lock dies with its process.

    Raises StageFailed if another process holds it, or if it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("a+b", buffering=0)
    except OSError as error:
        raise StageFailed(_unusable(directory, error)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(bytes(_PROBE))
                probe.flush()
            for left_by_a_kill in directory.glob(".*.tmp"):
                shutil.rmtree(left_by_a_kill) if left_by_a_kill.is_dir() else left_by_a_kill.unlink()
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip() or "unknown"
            raise StageFailed(f"process {holder} is already training this model; wait for it, or end it") from None
        except OSError as error:
            raise StageFailed(_unusable(directory, error)) from None
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)


def _let_go() -> None:
    """A forked child (a data loader's worker, say) must not hold the lock when its parent is gone."""
    for file in _locks:
        file.close()
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def save(directory: Path, checkpoint: Checkpoint, fingerprint: str, *, keep: int = KEEP) -> None:
    """Write a checkpoint, then remove all but it and the `keep` - 1 whole ones before it.

    Raises OSError, on a full disk for one, with those before it as they were; StageFailed for a tensor not finite.
    """
    state = HostCopy()
    state.take(checkpoint.tensors)
    _write(directory, checkpoint.step, state, fingerprint)
    _prune(directory, checkpoint.step, fingerprint, keep)


def load_newest(directory: Path, fingerprint: str) -> Checkpoint | None:
    """The newest whole checkpoint of this fingerprint, or None. Any other is passed over, with a line that says why."""
    steps = _steps(directory)
    for step in steps:
        path = path_of(directory, step)
        reason = defect(path, fingerprint)
        if reason is None:
            try:
                return Checkpoint(step, load_file(path))
            except (OSError, SafetensorError) as error:
                reason = f"it cannot be loaded ({error})"
        _log.warning("checkpoint %s is passed over: %s", path.name, reason)
    if steps:
        _log.warning("there is no whole checkpoint of this training in %s; it starts at step 0", directory)
    return None


def newest_step(directory: Path, fingerprint: str) -> int | None:
    """The step of the newest whole checkpoint of this fingerprint."""
    return next((step for step in _steps(directory) if defect(path_of(directory, step), fingerprint) is None), None)


def defect(path: Path, fingerprint: str) -> str | None:
    """Why a checkpoint cannot be resumed by a training of this fingerprint; None if it can. Reads the whole file."""
    try:
        voucher = read_json(voucher_of(path))
        step, size, digest, owner = (voucher[key] for key in ("step", "bytes", "sha256", "fingerprint"))
        if owner != fingerprint:
            return f"it belongs to another training (fingerprint {str(owner)[:12]}, this one's is {fingerprint[:12]})"
        if path_of(path.parent, int(step)) != path:
            return f"its voucher {voucher_of(path).name} is of step {step}"
        found = path.stat().st_size
        if found < size:
            return f"it is truncated ({found:,} of {size:,} bytes)"
        found_digest = digest_file(path)
        if found_digest != digest:
            return f"it was changed after it was written (sha256 {found_digest[:12]}, not {str(digest)[:12]})"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing; a kill or a full disk cut its writing short"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"its voucher {voucher_of(path).name} is damaged"
    return None


def path_of(directory: Path, step: int) -> Path:
    """The tensors after `step` steps."""
    return directory / f"step-{step:09d}.safetensors"


def voucher_of(path: Path) -> Path:
    """The JSON beside a file of tensors: its size in bytes, its sha256, its step and the training's fingerprint."""
    return path.with_suffix(".json")


def step_of(name: str) -> int | None:
    """The step in the name of a file of tensors or of a voucher."""
    match = re.fullmatch(r"step-(\d{9,})\.(safetensors|json)", name)
    return int(match[1]) if match else None


class Saver:
    """Writes checkpoints in a thread of its own; training waits only while its state is copied to host memory.

    Close it in a `finally`. A process that ends without that still finishes what it is writing; one that is killed
    leaves the checkpoints before as they were.
    """

    def __init__(self, directory: Path, fingerprint: str, *, keep: int = KEEP, mirror: Mirror | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: expected at least 1")
        self.seconds_of_last = 0.0  # for which the last save held up the training
        self._directory, self._fingerprint, self._keep = directory, fingerprint, keep
        self._state = HostCopy()
        self._writer: Thread | None = None
        self._problem: BaseException | None = None  # that the writer met and the training has to know
        self._whole: set[int] = set()  # steps whose files this process wrote or has checked
        self._mirroring = Mirroring(mirror, directory) if mirror else None

    def save(self, step: int, tensors: dict[str, Tensor], *, wait: bool = False) -> None:
        """Save the state after `step` steps; with `wait`, return only when it is durable on the disk.

        Never two writes at once: a save waits for the one before. A write that fails, on a full disk for one, is
        logged, and the next save tries again; with `wait` it raises StageFailed. A tensor that is not finite is never
        written: StageFailed, from this call with `wait`, else from the next. A step that is saved is not saved again.
        """
        started = time.monotonic()
        self._join()
        if step not in self._whole:
            self._state.take(tensors)
            if wait:
                try:
                    self._write(step)
                except OSError as error:
                    raise StageFailed(self._unwritten(step, error)) from None
            else:
                # No daemon: the interpreter waits for it at its end.
                self._writer = Thread(target=self._write_aside, args=[step], name=f"checkpoint of step {step}")
                self._writer.start()
        self.seconds_of_last = time.monotonic() - started

    def close(self) -> None:
        """Wait for the writer and the mirror. A problem that no later save raises is logged."""
        try:
            self._join()
        except Exception as error:
            _log.error("%s", error)
        if self._mirroring:
            self._mirroring.close()
            if self._whole:  # what was spared while it was being pushed can go now
                newest = max(self._whole)
                removed = _prune(self._directory, newest, self._fingerprint, self._keep, self._whole)
                if removed:
                    path = path_of(self._directory, newest)
                    self._mirroring.offer((path, voucher_of(path)), removed)
                    self._mirroring.close()

    def _join(self) -> None:
        if self._writer:
            self._writer.join()
            self._writer = None
        problem, self._problem = self._problem, None
        if problem:
            raise problem

    def _write_aside(self, step: int) -> None:
        try:
            self._write(step)
        except OSError as error:
            _log.warning("%s; training goes on, the next save tries again", self._unwritten(step, error))
        except BaseException as error:
            self._problem = error

    def _write(self, step: int) -> None:
        path = _write(self._directory, step, self._state, self._fingerprint)
        self._whole.add(step)
        spared = self._mirroring.busy() if self._mirroring else ()
        removed = _prune(self._directory, step, self._fingerprint, self._keep, self._whole, spared)
        if self._mirroring:
            self._mirroring.offer((path, voucher_of(path)), removed)

    def _unwritten(self, step: int, error: OSError) -> str:
        whole = newest_step(self._directory, self._fingerprint)
        before = "there is none before it" if whole is None else f"the one of step {whole} is intact"
        return f"checkpoint of step {step} could not be written to {self._directory}: {error.strerror}; {before}"


@dataclass
class Schedule:
    """When to save: by time, but for no more than `cost` of it, and by steps if that was asked for, whatever it costs.

    Counts from `step` and `now` (in seconds, of any monotonic clock), the last save or the start.
    """

    step: int
    now: float
    every_seconds: float
    every_steps: int | None = None
    cost: float = SAVE_COST
    pause: float = 0.0  # seconds between saves by time at the least, for the cost of the last one

    def due(self, step: int, now: float) -> bool:
        """Whether to save after `step` steps."""
        elapsed, steps = now - self.now, step - self.step
        by_steps = self.every_steps is not None and steps >= self.every_steps
        return steps > 0 and (by_steps or elapsed >= max(self.every_seconds, self.pause))

    def saved(self, step: int, now: float, seconds: float) -> None:
        """Take note of a save that ended now and held up the training for `seconds`."""
        self.step, self.now, self.pause = step, now, seconds / self.cost


def _write(directory: Path, step: int, state: HostCopy, fingerprint: str) -> Path:
    name = state.not_finite()
    if name is not None:
        raise StageFailed(
            f"{name} is not finite after step {step}, which was not saved: the training has diverged;"
            f" train.learning_rate may be too high. The last good checkpoint is kept in {directory}"
        )
    path = path_of(directory, step)
    with replacing(path) as temporary:
        size, digest = state.write(temporary)
    try:
        voucher = {"bytes": size, "fingerprint": fingerprint, "sha256": digest, "step": step}
        write_json(voucher_of(path), voucher)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _prune(
    directory: Path, newest: int, fingerprint: str, keep: int, whole: Collection[int] = (), spared: Collection[str] = ()
) -> list[str]:
    """Remove all but `newest`, the `keep` - 1 whole checkpoints before it and what is `spared`; returns the names.

    Files of later steps are what a resumed training has passed over as damaged; they go too.
    """
    steps, kept = _steps(directory), {newest}
    for step in steps:
        wanted = len(kept) < keep and step < newest
        if wanted and (step in whole or defect(path_of(directory, step), fingerprint) is None):
            kept.add(step)
    files = [path_of(directory, step) for step in steps if step not in kept]
    removed = [file for path in files for file in (voucher_of(path), path) if path.name not in spared]
    for file in removed:
        file.unlink(missing_ok=True)
    return [file.name for file in removed]


def _steps(directory: Path) -> list[int]:
    """Steps of which there is a file of tensors or a voucher, newest first."""
    files = directory.iterdir() if directory.exists() else ()
    return sorted({step for file in files if (step := step_of(file.name)) is not None}, reverse=True)


def _unusable(directory: Path, error: OSError) -> str:
    return (
        f"checkpoints cannot be written to {directory}: {error.strerror}; it has to be writable and to have room for"
        " them, or DARKROOM_STATE has to name another place"
    )
