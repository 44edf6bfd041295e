"""The outputs of a version, through DVC's commands: what would be lost, what is missing, what would run again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from darkroom.errors import InputError, StageFailed
from darkroom.params_errors import shortened
from darkroom.registry import dvc_reading
from darkroom.registry.dvc_config import portable_config
from darkroom.registry.snapshot import LOCK, lock_stages

_LISTED = 12  # names in a message
_UNSAVED = "Can't remove the following unsaved files without confirmation"  # says DVC; their paths follow, one a line
LOSS = (
    "these have changes that exist nowhere else: {}; commit them (`git commit`, `dvc commit`) or move them away, or "
    "overwrite them with --force"
)


def uncached_outputs(root: Path) -> list[str]:
    """Outputs on disk that are not what `dvc.lock` says; empty where there is no lock yet."""
    if not (root / ".dvc").is_dir() or not (root / LOCK).is_file() or not (root / "dvc.yaml").is_file():
        return []
    changed = _data_status(root).get("uncommitted", {})
    return sorted(str(name) for kind in ("modified", "added") for name in changed.get(kind, []))


def bring_outputs(root: Path, listed: list[dict[str, Any]], force: bool) -> int:
    """Fetch what the cache lacks, then put every output in place; return how many there are.

    `listed` are the outputs as `foreign.list_outputs` found them in order; DVC fetches none that is not listed. Raises
    StageFailed, naming them, if outputs are neither in the cache nor on the remote: nothing on disk has changed then.
    Raises InputError if an output on disk exists nowhere else, unless `force` is given.
    """
    missing = _not_in_cache(root)
    if missing:
        remote = portable_config(root).get("core", {}).get("remote")
        error = next((entry["error"] for entry in listed if entry["error"]), None)
        paths = [entry["path"] for entry in listed if entry["files"] is not None]
        if remote and paths and not error:
            done = _run(root, "fetch", "--", *paths)  # an output may be called --x
            error = _last_error(done) if done.returncode != 0 else None
            missing = _not_in_cache(root)
        if missing:
            if remote is None:
                where = "and there is no remote; `dvc remote add --default NAME URL` names one"
            elif error:
                where = f"and remote {remote!r} cannot be read: {error}"
            else:
                where = f"nor on remote {remote!r}; `dvc push`, where the version was made, brings them there"
            raise StageFailed(
                f"{len(missing)} outputs are not in DVC's cache {where}. Missing: {some(missing)}. The project's "
                "files are in place; repeat this command then"
            )
    done = _run(root, "checkout", *(["--force"] if force else []))
    _, unsaved, names = done.stderr.partition(_UNSAVED)
    if unsaved:
        lost = [os.path.relpath(line, root) for line in names.splitlines()[1:] if line.startswith(os.sep)]
        raise InputError(LOSS.format(some(lost)))
    if done.returncode != 0:
        raise StageFailed(f"`dvc checkout` failed: {_last_error(done)}; repeat this command when that is put right")
    return sum(len(stage.get("outs", [])) for stage in lock_stages((root / LOCK).read_bytes()).values())


def _not_in_cache(root: Path) -> list[str]:
    """What the cache lacks: outputs, and single files of those that it has in part."""
    names = _data_status(root, "--granular").get("not_in_cache", [])
    whole = tuple(name for name in names if name.endswith("/"))
    return sorted(name for name in names if name in whole or not name.startswith(whole))


def pending_stages(root: Path) -> dict[str, list[str]]:
    """What DVC would run again, and why."""
    status: dict[str, list[Any]] = json.loads(dvc(root, "status", "--json") or "{}")
    return {stage: sorted(_reasons(changes)) for stage, changes in sorted(status.items())}


def _reasons(changes: Iterable[Any]) -> list[str]:
    lines = []
    for change in changes:
        if isinstance(change, dict):
            for what, names in change.items():
                lines += [f"{what}: {name} {how}" for name, how in names.items()] if isinstance(names, dict) else [what]
        else:
            lines.append(str(change))
    return lines


def _data_status(root: Path, *options: str) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(dvc(root, "data", "status", "--json", *options) or "{}")
    return status


def dvc(root: Path, *arguments: str) -> str:
    """What a DVC command prints. Raises StageFailed with its error in one line."""
    done = _run(root, *arguments)
    if done.returncode != 0:
        raise StageFailed(f"`dvc {' '.join(arguments)}` failed: {_last_error(done)}")
    return done.stdout


def reading(root: Path, what: str, seconds: float | None = None) -> Any:
    """What `dvc_reading` prints in `root`. Raises StageFailed if DVC cannot read the pipeline, or not in that time."""
    try:
        done = _python(root, str(Path(dvc_reading.__file__)), what, seconds=seconds)
    except subprocess.TimeoutExpired:
        raise StageFailed(f"DVC needs more than {seconds:.0f} s to read the version's pipeline") from None
    if done.returncode != 0:
        raise StageFailed(f"DVC cannot read the version's pipeline: {shortened(_last_error(done))}")
    return json.loads(done.stdout)


def _run(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return _python(root, "-m", "dvc", *arguments)


def _python(root: Path, *arguments: str, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds)


def _last_error(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return next(reversed(errors or lines), f"exit code {done.returncode}")


def some(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    shown = ", ".join(sorted(names)[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
