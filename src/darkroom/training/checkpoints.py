"""Checkpoints that are whole or not there: tensors as safetensors, and a JSON, written last, that vouches for them.

The directory belongs to one training fingerprint, lies outside DVC's outputs (DVC deletes outputs before a stage runs),
and is locked by the process that trains in it.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from darkroom.errors import StageFailed
from darkroom.files import digest_file, read_json, replacing, write_json

KEEP = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The complete state after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the training directory; raises StageFailed if another process does. The lock dies with its process."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StageFailed(f"process {holder} is already training this model; wait for it, or end it") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        for left_by_a_kill in directory.glob(".*.tmp"):
            left_by_a_kill.unlink()
        yield


def save(directory: Path, checkpoint: Checkpoint, fingerprint: str) -> None:
    """Write a checkpoint, then remove all but it and the `KEEP` - 1 before it. On a full disk those stay as they are.

    Files of later steps are what a resumed training has passed over as damaged; they go too.
    """
    path = directory / f"step-{checkpoint.step:09d}.safetensors"
    try:
        with replacing(path) as temporary:
            save_file(checkpoint.tensors, temporary)
            digest = digest_file(temporary)
        write_json(_voucher(path), {"fingerprint": fingerprint, "sha256": digest, "step": checkpoint.step})
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    files = _newest_first(directory)
    before = [file for file in files if file.name < path.name and _voucher(file).exists()]
    for old in set(files) - {path, *before[: KEEP - 1]}:
        _voucher(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def load_newest(directory: Path, fingerprint: str) -> Checkpoint | None:
    """The newest whole checkpoint of this fingerprint, or None. A damaged one is reported and passed over."""
    for path in _newest_first(directory):
        try:
            voucher = read_json(_voucher(path))
            whole = voucher["fingerprint"] == fingerprint and voucher["sha256"] == digest_file(path)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return Checkpoint(voucher["step"], load_file(path))
        _log.warning("checkpoint %s is damaged or incomplete; falling back to the one before it", path.name)
    return None


def _voucher(path: Path) -> Path:
    return path.with_suffix(".json")


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.safetensors"), reverse=True)
