"""From a version alone back to the project that made it: parameters, pipeline, lock, code and data.

First everything is fetched and checked, then the files are written beside and renamed into place, then DVC brings the
outputs. Each step finds what an earlier attempt has done, so the same command completes a checkout that was killed.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from darkroom.errors import InputError, StageFailed
from darkroom.files import alone_in, sync_directory, write_text
from darkroom.params_errors import shortened
from darkroom.registry.dvc_config import Config, amend
from darkroom.registry.dvc_outputs import LOSS, bring_outputs, dvc, pending_stages, some, uncached_outputs
from darkroom.registry.foreign import inspect, list_outputs
from darkroom.registry.snapshot import LOCK, collect, fetch_snapshot, lock_stages
from darkroom.registry.tracking import connect, current, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import PROJECT_TAG, REGISTERED_BY_TAG, find_by_uri, run_of
from darkroom.workspace import Workspace

_STAGING = ".darkroom/checkout"  # in the project, not in its state: a rename must not leave the file system


@dataclass(frozen=True)
class CheckedOut:
    """What a checkout did. `pending`: the stages that `dvc repro` would still run, each with what DVC says of it."""

    name: str
    version: str
    root: str
    files: int  # of the project, all of them as they were
    written: list[str]  # those that were missing or different
    removed: list[str]  # those that stages depend on and that did not exist then
    remotes: dict[str, str]  # added to DVC's configuration: name -> URL
    refused: list[str]  # places of the version's remotes that were not added, as nobody agreed to them
    outputs: int | None  # of the pipeline, all of them there; None without data
    commit: str | None  # that the version was registered from
    dirty: bool  # and whether the tree differed from it
    registered_by: str | None
    notice: str  # whose code it is, and what runs it
    head: str | None  # this checkout's commit, which stays; None outside git
    pending: dict[str, list[str]] = field(default_factory=dict)


def checkout(
    workspace: Workspace,
    uri: str,
    *,
    force: bool = False,
    data: bool = True,
    trusted: Collection[str] = (),
    agrees: Callable[[str], bool] = lambda place: False,
    tell: Callable[[str], None] = lambda notice: None,
) -> CheckedOut:
    """Make the directory what it was when a version was registered; afterwards `dvc repro` has nothing to do.

    The directory is a project or an empty one. Nothing is committed, and HEAD stays. `force` overwrites work that
    neither git's HEAD nor DVC's cache holds; `data=False` leaves the outputs alone. Data comes from where this user's
    own configuration says, from `trusted` places and from those that `agrees`, asked with each other one, says yes to.
    No code of the version runs; what runs it later is given to `tell` before anything is written.

    Raises InputError if there is no such version, if work would be lost or if a place is not agreed to; StageFailed if
    the snapshot is not there or was altered, if it holds what no project does (`foreign.inspect`), if outputs are
    neither in DVC's cache nor on its remote or if DVC fails; RegistryUnavailable if the server does not answer.
    """
    root, tracking = workspace.root, tracking_uri(workspace)
    client = connect(workspace)
    with unavailable_is_one_line(tracking), current(tracking):
        version = find_by_uri(client, uri)
        digest = version.tags.get(PROJECT_TAG)
        commit = version.tags.get("darkroom.git_commit")
        if digest is None:
            raise InputError(
                f"{uri}: registered before versions kept their project; `darkroom register`, where its outputs are, "
                "adds it" + (f", or git checkout {commit}" if commit else "")
            )
        files = fetch_snapshot(client, run_of(version), digest)
    if LOCK not in files:
        raise InputError(f"{uri}: registered from a project without dvc.lock: there are no outputs to bring back")
    offer = inspect(root, files)
    changes = _plan(root, offer.files)
    if not force:
        _refuse_loss(root, offer.files, changes)
    refused = [place for place in offer.places if place not in trusted]
    if data:
        refused = _disagreed(uri, refused, agrees)
    dirty = version.tags.get("darkroom.git_dirty") == "true"
    registered_by = version.tags.get(REGISTERED_BY_TAG)
    notice = _notice(f"{version.name} version {version.version}", registered_by, commit, dirty)
    tell(notice)
    busy = StageFailed(f"{root}: another checkout is at work here; repeat this when it is done")
    with alone_in(root / _STAGING, busy):
        _switch(root, offer.files, changes)
        remotes = _configure(root, offer.without(set(refused)))
        outputs, pending = None, {}
        if data:
            outputs = bring_outputs(root, list_outputs(root), force)
            pending = pending_stages(root)
        _remove_staging(root)
    return CheckedOut(
        name=str(version.name),
        version=str(version.version),
        root=str(root),
        files=len(offer.files),
        written=changes.written,
        removed=changes.removed,
        remotes=remotes,
        refused=refused,
        outputs=outputs,
        commit=commit,
        dirty=dirty,
        registered_by=registered_by,
        notice=notice,
        head=_git(root, "rev-parse", "--verify", "--quiet", "HEAD"),
        pending=pending,
    )


def _disagreed(uri: str, places: list[str], agrees: Callable[[str], bool]) -> list[str]:
    """Ask for each place. Raises InputError, naming them, unless the user agrees to all."""
    if left := [place for place in places if not agrees(place)]:
        options = " ".join(f"--trust-remote '{place}'" for place in left)
        raise InputError(
            f"{uri} takes data from {some(left)}, which this project's own configuration does not name; {options} "
            "agrees to that, --no-data leaves it; nothing was written"
        )
    return []


def _notice(name: str, registered_by: str | None, commit: str | None, dirty: bool) -> str:
    by = f" by {shortened(registered_by)}" if registered_by else ""
    at = f" from commit {shortened(commit)[:12]}" if commit else ""
    at += " with uncommitted changes" if dirty else ""
    return (
        f"{name} was registered{by}{at}; this command runs none of its code, but the next `dvc repro`, `darkroom "
        "promote`, `make` target or flow in this directory does, and serving it does anywhere"
    )


@dataclass(frozen=True)
class _Changes:
    written: list[str]
    removed: list[str]


def _plan(root: Path, files: dict[str, bytes]) -> _Changes:
    """What has to be written, and what has to go because a stage depends on the directory that it is in."""
    real = root.resolve()
    written = []
    for name, content in files.items():
        path = root / name
        above = [parent for parent in path.parents if parent.is_relative_to(root) and os.path.lexists(parent)]
        if path.is_dir() or not all(parent.is_dir() for parent in above):
            raise InputError(f"{path}: cannot be written: a directory is where a file belongs, or the other way round")
        if not path.parent.resolve().is_relative_to(real):
            raise InputError(f"{path}: leads out of the project through a symbolic link; expected a directory")
        if path.is_symlink() or not path.is_file() or path.read_bytes() != content:
            written.append(name)
    written.sort(key=lambda name: (name == LOCK, name))  # the lock comes last: until then outputs and lock agree
    depended_on = _directories(files)
    removed = [
        name for name in collect(root) if name not in files and any(name.startswith(place) for place in depended_on)
    ]
    return _Changes(written, removed)


def _directories(files: dict[str, bytes]) -> set[str]:
    """Where a file too many makes a stage run: the directories that the snapshot's stages depend on."""
    stages = lock_stages(files.get(LOCK, b"")).values()
    return {f"{dependency['path']}/" for stage in stages for dependency in stage.get("deps", [])}


def _refuse_loss(root: Path, files: dict[str, bytes], changes: _Changes) -> None:
    """Raise InputError if something would be overwritten that exists nowhere else, or if the directory is another's."""
    if not (root / "dvc.yaml").is_file() and not (root / ".dvc").is_dir():
        known = {name.split("/")[0] for name in files} | {".git", ".dvc", ".darkroom"}
        foreign = sorted(path.name for path in root.iterdir() if path.name not in known)
        if foreign:
            raise InputError(
                f"{root} is neither a project nor empty: it holds {some(foreign)}; --force fills it anyway"
            )
    touched = [name for name in changes.written if os.path.lexists(root / name)] + changes.removed
    lost = _uncommitted(root, touched) if touched else []
    if LOCK in changes.written:  # else an earlier attempt got as far as the outputs, and DVC itself takes care of them
        lost += uncached_outputs(root)
    if lost:
        raise InputError(LOSS.format(some(lost)))


def _uncommitted(root: Path, names: list[str]) -> list[str]:
    """Those of the files that are not as in git's HEAD; all of them where there is no git."""
    prefix = _git(root, "rev-parse", "--show-prefix")
    if prefix is None:
        return names
    if _git(root, "rev-parse", "--verify", "--quiet", "HEAD") is None:
        return names
    arguments = ["status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--ignored", "--"]
    listed = _git(root, "--literal-pathspecs", *arguments, *names)
    if listed is None:
        return names
    changed = {entry[3:].removeprefix(prefix) for entry in listed.split("\0") if entry}
    return [name for name in names if name in changed]


def _switch(root: Path, files: dict[str, bytes], changes: _Changes) -> None:
    """Write the new files beside, then rename them into place; remove what was not there then."""
    staging = root / _STAGING
    for stale in staging.iterdir():
        stale.unlink()
    staged = {name: staging / str(number) for number, name in enumerate(changes.written)}
    for name, path in staged.items():
        with path.open("wb") as file:
            file.write(files[name])
            file.flush()
            os.fsync(file.fileno())
    if not (root / ".dvc").is_dir():
        _initialise(root)
    for name, path in staged.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(root / name)
    for name in changes.removed:
        (root / name).unlink()
    for directory in {(root / name).parent for name in (*changes.written, *changes.removed)}:
        sync_directory(directory)


def _initialise(root: Path) -> None:
    top = _git(root, "rev-parse", "--show-toplevel")
    how = ["--no-scm"] if top is None else [] if Path(top).resolve() == root.resolve() else ["--subdir"]
    dvc(root, "init", "--quiet", *how)


def _configure(root: Path, added: Config) -> dict[str, str]:
    """Add remotes that this checkout does not know: to what git tracks where there is no git, else beside it."""
    local = _git(root, "rev-parse", "--git-dir") is not None
    path = root / ".dvc" / ("config.local" if local else "config")
    if local:
        core = {key: value for key, value in added.get("core", {}).items() if key == "remote"}
        added = {name: values for name, values in (added | {"core": core}).items() if values}
    if added:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        with _private() if local else contextlib.nullcontext():
            write_text(path, amend(text, added))
    return {name.partition('"')[2].rstrip('"'): values["url"] for name, values in added.items() if "url" in values}


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """Files that are made meanwhile are their owner's alone: this machine's configuration may hold credentials."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _git(root: Path, *arguments: str) -> str | None:
    """What a git command prints, None if it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip("\n")


def _remove_staging(root: Path) -> None:
    staging = root / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds more than this
        staging.parent.rmdir()
