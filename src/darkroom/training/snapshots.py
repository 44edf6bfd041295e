"""Snapshots of the power-function averages, from which `posthoc` makes averages of other widths.

While a model trains they lie in `snapshots/` of its checkpoint directory, one file for each step and width; at the end
`collect` copies them to where they are kept. `snapshots.json` beside them names each file's step, width and sha256.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from darkroom.errors import InputError, StageFailed
from darkroom.files import digest_file, read_json, replacing, replacing_directory, write_json
from darkroom.training.ema import PowerEMA, width_name

INDEX_FILE = "snapshots.json"
DIRECTORY = "snapshots"  # within the checkpoint directory


@dataclass(frozen=True)
class Snapshot:
    """One average of one training: a line of `snapshots.json`."""

    step: int
    width: float
    sha256: str

    @property
    def file_name(self) -> str:
        return _file_name(self.step, self.width)


@dataclass(frozen=True)
class Snapshots:
    """What `snapshots.json` says."""

    fingerprint: str  # of the training
    snapshots: list[Snapshot]  # by step, then width


def snapshot_steps(total: int, count: int) -> list[int]:
    """The steps (from 1) after which a training of `total` steps takes its snapshots: evenly spaced, the last included.

    There are `count`, or `total` if that is fewer; none for 0.
    """
    count = min(count, total)
    return [total * number // count for number in range(1, count + 1)]


def write_snapshot(directory: Path, step: int, ema: PowerEMA, fingerprint: str) -> None:
    """Write every average after `step` to `<directory>/snapshots/`; `directory` is the checkpoint directory.

    Write it before a checkpoint of this step or a later one is saved: then a training that resumes has all snapshots
    up to its step, and writes those after it again, equal to the last bit. Waits for the GPU. Raises StageFailed if the
    files cannot be written; those that were there stay as they are.
    """
    target = directory / DIRECTORY
    try:
        target.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in target.glob(".*.tmp"):
            left_by_a_kill.unlink()
        index = read_index(target) if (target / INDEX_FILE).exists() else Snapshots(fingerprint, [])
        known = {s.file_name: s for s in index.snapshots if index.fingerprint == fingerprint}
        for width, network in ema.networks.items():
            buffers = sorted(name for name, _ in network.named_buffers())
            about = {"buffers": buffers, "fingerprint": fingerprint, "step": step, "width": width}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
            path = target / _file_name(step, width)
            with replacing(path) as temporary:
                # One key: safetensors writes several in an order that changes from process to process.
                save_file(tensors, temporary, metadata={"snapshot": json.dumps(about, sort_keys=True)})
                known[path.name] = Snapshot(step, width, digest_file(temporary))
        _write_index(target, fingerprint, known.values())
    except (OSError, SafetensorError, InputError) as error:
        raise StageFailed(
            f"the EMA snapshot of step {step} cannot be written to {target}: {error}; once it can, the same command"
            " carries on from the last checkpoint"
        ) from error


def missing_snapshots(directory: Path, steps: Sequence[int], widths: Sequence[float]) -> list[str]:
    """The files of `steps` and `widths` that the checkpoint directory does not hold; their content is not looked at."""
    source = directory / DIRECTORY
    known = {s.file_name for s in read_index(source).snapshots} if (source / INDEX_FILE).exists() else set()
    names = [_file_name(step, width) for step in steps for width in widths]
    return [name for name in names if name not in known or not (source / name).is_file()]


def collect(directory: Path, target: Path, steps: Sequence[int], widths: Sequence[float]) -> None:
    """Copy the snapshots of `steps` and `widths` from the checkpoint directory to `target`, all or none.

    Of no steps, `target` gets an index that lists nothing. Raises StageFailed, naming the file, if one is missing or
    damaged: it cannot be made again without training anew.
    """
    source = directory / DIRECTORY
    try:
        if missing := missing_snapshots(directory, steps, widths):
            raise InputError(f"{source}: holds no {', '.join(missing)}")
        index = read_index(source) if steps else Snapshots("", [])
        wanted = [s for s in index.snapshots if s.step in steps and s.width in widths]
        with replacing_directory(target) as new:
            for snapshot in wanted:
                shutil.copyfile(source / snapshot.file_name, new / snapshot.file_name)
                _check_digest(new / snapshot.file_name, snapshot, source)
            _write_index(new, index.fingerprint, wanted)
    except InputError as error:
        raise StageFailed(f"{error}; remove {directory} to train again from the first step") from None


def read_index(directory: Path) -> Snapshots:
    """What `snapshots.json` in `directory` says. Raises InputError if it cannot be read."""
    path = directory / INDEX_FILE
    try:
        content = read_json(path)
        return Snapshots(str(content["fingerprint"]), [_snapshot(line) for line in content["snapshots"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a list of snapshots: {error!r}") from None


def read_snapshot(directory: Path, snapshot: Snapshot, fingerprint: str) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of a snapshot, and which of them are buffers. Raises InputError if it is missing or damaged."""
    path = directory / snapshot.file_name
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    _check_digest(path, snapshot, directory)
    expected = {"fingerprint": fingerprint, "step": snapshot.step, "width": snapshot.width}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["snapshot"])
        if about | expected != about:
            raise InputError(f"{path}: is of another training, step or width than {INDEX_FILE} says")
        return load_file(path), set(about["buffers"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a snapshot: {error!r}") from None


def _file_name(step: int, width: float) -> str:
    return f"step-{step:09d}-width-{width_name(width)}.safetensors"


def _snapshot(line: dict[str, Any]) -> Snapshot:
    snapshot = Snapshot(int(line["step"]), float(line["width"]), str(line["sha256"]))
    if line["file"] != snapshot.file_name:
        raise ValueError(f"{line['file']!r} instead of {snapshot.file_name!r}")
    return snapshot


def _write_index(directory: Path, fingerprint: str, snapshots: Iterable[Snapshot]) -> None:
    in_order = sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.width))
    lines = [{"file": snapshot.file_name, **asdict(snapshot)} for snapshot in in_order]
    write_json(directory / INDEX_FILE, {"fingerprint": fingerprint, "snapshots": lines})


def _check_digest(path: Path, snapshot: Snapshot, origin: Path) -> None:
    found = digest_file(path)
    if found != snapshot.sha256:
        raise InputError(
            f"{origin / snapshot.file_name}: is damaged: sha256 is {found[:12]}…, {INDEX_FILE} says"
            f" {snapshot.sha256[:12]}…"
        )
