"""A checkout of its own for each run: at a git ref, with the shared DVC cache, raw data and local state.

Runs never share a working tree, so that none sees another's half-made outputs. What makes one resume another is
shared: checkpoints, which are named by what they are of, the DVC cache, and the registry.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from darkroom.errors import StageFailed
from darkroom.files import digest_bytes, write_text
from darkroom.registry.dvc_config import Config, read_config, write_config
from flows import raw_data
from flows.git import clone
from flows.locks import locked, locked_if_free
from flows.overrides import override
from flows.raw_data import newest_first
from flows.settings import Settings

_KEPT = ".git/darkroom-kept"  # in a workspace that its run wants to leave, with the reason
_TRASH = ".removed-"  # how a workspace's name begins while it is being removed
_PATH_KEYS = {"url", "configpath", "credentialpath", "keyfile", "cert_path", "key_path"}  # of a remote


@contextlib.contextmanager
def workspace(
    name: str, ref: str, params: Mapping[str, Any] | None = None, log: Callable[[str], None] = print
) -> Iterator[Path]:
    """A fresh checkout of the project at `ref`, for the run called `name`; removed at the end.

    `params` replace values of its params.yaml, by dotted keys. Meanwhile the environment names the shared state, for
    library and commands alike. A block that raises, or calls `keep`, leaves the workspace for a look; of those the
    newest `DARKROOM_KEEP_WORKSPACES` stay. Raises InputError for a ref or a parameter that does not exist, and
    StageFailed if the workspace is in use or cannot be made; nothing of it is left then.
    """
    settings = Settings.from_environment()
    prune_workspaces(settings)  # before: the disk may be full
    root = settings.workspaces / _directory(name)
    try:
        with settings.shared(), _claimed(root):
            try:
                commit = clone(settings.repository, ref, root)
                _configure_dvc(settings, root)
                override(root, params or {})
                raw_data.link(settings, root)
            except BaseException as error:
                _remove(root)
                if isinstance(error, OSError):
                    raise StageFailed(f"{root}: the workspace cannot be made: {error.strerror or error}") from None
                raise
            log(f"workspace {root.name}: {ref} is commit {commit[:12]}")
            yield root
            if not (root / _KEPT).exists():
                _remove(root)
    finally:
        with contextlib.suppress(OSError):  # what cannot be removed is no reason to lose what was made
            prune(settings)


def keep(root: Path, reason: str) -> None:
    """Leave the workspace `root` for a look when its block ends."""
    if (root / _KEPT).parent.is_dir():
        write_text(root / _KEPT, f"{reason}\n")


def prune(settings: Settings) -> None:
    """Remove what earlier runs left and no run needs: workspaces, checkpoints, raw data; never what is in use."""
    prune_workspaces(settings)
    prune_checkpoints(settings)
    raw_data.prune(settings)


def prune_workspaces(settings: Settings) -> None:
    """Remove all but the newest workspaces of runs that failed, and what a kill left of others."""
    unused = []
    for root in newest_first(settings.workspaces):
        with locked_if_free(root) as free:
            if free:
                unused.append(root)
    kept = [root for root in unused if not root.name.startswith(_TRASH)][: settings.keep_workspaces]
    for root in unused:
        if root not in kept:
            _remove_unused(settings, root)


def prune_checkpoints(settings: Settings) -> None:
    """Remove the checkpoints of all but the newest trainings; never those that a trainer has locked."""
    for directory in newest_first(settings.checkpoints)[settings.keep_checkpoints :]:
        lock = directory / "lock"
        with locked_if_free(lock) as free:
            if free or not lock.exists():
                shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _claimed(root: Path) -> Iterator[None]:
    """Make the directory, empty, and hold it; one of that name that nobody holds is from an earlier attempt."""
    with contextlib.ExitStack() as stack:
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with locked(root.parent):  # nobody prunes between the two steps
                if root.exists():
                    with locked_if_free(root) as free:
                        if not free:
                            raise StageFailed(f"workspace {root.name} is in use by another run of that name")
                        _remove(root)
                root.mkdir()
                stack.enter_context(locked(root))
        except OSError as error:
            raise StageFailed(f"{root}: the workspace cannot be made: {error.strerror}") from None
        yield


def _remove_unused(settings: Settings, root: Path) -> None:
    with locked(settings.workspaces), locked_if_free(root) as free:
        if free:
            _remove(root)


def _remove(root: Path) -> None:
    """Under another name first: what a kill leaves of it is no workspace."""
    if not root.name.startswith(_TRASH):
        with contextlib.suppress(OSError):
            root = root.rename(root.with_name(f"{_TRASH}{time.time_ns()}"))
    shutil.rmtree(root, ignore_errors=True)


def _directory(name: str) -> str:
    """A directory's name for a run's; other names stay other ones."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "run"
    return plain if plain == name else f"{plain}-{digest_bytes(name.encode())[:8]}"


def _configure_dvc(settings: Settings, root: Path) -> None:
    """The project's own DVC configuration, where this machine's credentials may be, with the shared cache."""
    shared, local = read_config(root / ".dvc" / "config"), read_config(settings.project / ".dvc" / "config.local")
    config = _merged(_absolute(shared, settings.project), local, _absolute(local, settings.project))
    cache = {"dir": str(settings.dvc_cache)}
    if "type" not in shared.get("cache", {}) | local.get("cache", {}):
        # Stages replace their outputs and never write into them; a copy of a large data set takes minutes.
        cache["type"] = "reflink,hardlink,copy"
    own = {"cache": cache, "core": {"site_cache_dir": str(root / ".dvc" / "tmp" / "site")}}  # goes with the workspace
    descriptor = os.open(root / ".dvc" / "config.local", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:  # there may be credentials in it
        file.write(write_config(_merged(config, own)))


def _absolute(config: Config, project: Path) -> Config:
    """The relative paths of remotes, which are relative to `.dvc`, as absolute ones."""
    found: Config = {}
    for section, values in config.items():
        for key, value in values.items():
            path = Path(value).expanduser()
            if key in _PATH_KEYS and "://" not in value and not path.is_absolute():
                found.setdefault(section, {})[key] = str((project / ".dvc" / path).resolve())
    return found


def _merged(*configs: Config) -> Config:
    """One configuration; what comes later counts."""
    sections = {section for config in configs for section in config}
    return {name: dict(pair for config in configs for pair in config.get(name, {}).items()) for name in sections}
