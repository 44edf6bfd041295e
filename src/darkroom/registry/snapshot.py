"""The project as one file: all that `dvc repro` reads beside DVC's own outputs and raw data.

A version's snapshot makes it independent of git: it holds a tree with uncommitted changes as it was, and a directory
that never saw git can be filled from it. The archive is deterministic (sorted, no times, not compressed), so one
project has one digest, whatever the machine. No credentials get into it: of DVC's configuration it takes the keys that
say where the remotes are. What is written and what is taken from somebody else's obey one rule (`belongs`).
"""

import io
import logging
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from darkroom.errors import StageFailed
from darkroom.files import digest_bytes
from darkroom.registry.dvc_config import portable_config, write_config
from darkroom.registry.tracking import first_line
from darkroom.yaml_text import parse_yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONFIG = ".dvc/config"
LOCK, PARAMS = "dvc.lock", "params.yaml"
FILES = (
    "dvc.yaml",
    LOCK,
    PARAMS,
    ".dvcignore",
    ".gitignore",
    "data/.gitignore",
    "pyproject.toml",
    "requirements.lock",
    "Makefile",
    "prefect.yaml",
    "README.md",  # this and the next are what pyproject.toml names: without them the package cannot be installed
    "LICENSE",
)
DIRECTORIES = ("src/darkroom", "flows", "expectations")
_SKIPPED = {"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".git", ".dvc"}
_DOT_FILES = (".gitkeep", ".gitignore", ".dvcignore")
_BY_ITSELF = re.compile(  # what Python, pip or DVC reads without being asked, wherever it lies
    r"(site|user)customize(\..*)?|(site|dist)-packages|pyvenv\.cfg|__pycache__|.*\.(pyc|egg-info|dist-info|egg-link)|"
    r"dvc\.(yaml|lock)",
    re.IGNORECASE,
)
_RAW = "data/raw"
_ARTIFACTS = "project"  # the directory of snapshots in a run: a training that is scored anew has several
_MAX_FILE = 16 << 20  # bytes of a dependency that is still taken for code
_MAX_TOTAL = 256 << 20  # bytes of a snapshot that is unpacked

_logger = logging.getLogger(__name__)


def pack_project(root: Path) -> bytes:
    """The snapshot of the project in `root`: a zip of `collect` and of DVC's configuration without secrets."""
    files = {name: (root / name).read_bytes() for name in collect(root)}
    if config := portable_config(root):
        files[CONFIG] = write_config(config).encode()
    return pack(files)


def collect(root: Path) -> list[str]:
    """The names of the files that are there and belong to the project, relative to `root`, sorted."""
    names = {name for name in FILES if (root / name).is_file()}
    for directory in DIRECTORIES:
        names.update(_files_below(root, directory))
    names.update(_raw_files(root))
    names.update(path.relative_to(root).as_posix() for place in (root, root / "data") for path in place.glob("*.dvc"))
    places = dependencies((root / LOCK).read_bytes()) if (root / LOCK).is_file() else []
    names.update(_files_of(root, places))
    return sorted(name for name in names if (root / name).is_file() and belongs(name, places))


def _files_below(root: Path, directory: str) -> Iterator[str]:
    for place, inner, files in os.walk(root / directory):
        inner[:] = [name for name in inner if name not in _SKIPPED]
        for name in files:
            if not name.endswith(".pyc"):
                yield (Path(place) / name).relative_to(root).as_posix()


def _raw_files(root: Path) -> Iterator[str]:
    """What is in data/raw beside the data: DVC's pointers and git's files. Directories that DVC tracks are not read."""
    for place, inner, files in os.walk(root / _RAW):
        there = set(files)
        inner[:] = [name for name in inner if f"{name}.dvc" not in there]
        for name in files:
            if name.endswith(".dvc") or name in _DOT_FILES:
                yield (Path(place) / name).relative_to(root).as_posix()


def _files_of(root: Path, places: list[str]) -> Iterator[str]:
    """The files of dependencies. A large one is data, and data is DVC's."""
    for place in places:
        for name in [place] if (root / place).is_file() else _files_below(root, place):
            if (root / name).is_file() and (root / name).stat().st_size <= _MAX_FILE:
                yield name
            else:
                _logger.warning("%s: larger than %s MiB, not kept with the version", name, _MAX_FILE >> 20)


def dependencies(lock: bytes) -> list[str]:
    """What the stages of a `dvc.lock` depend on that is neither an output nor raw data: files and directories."""
    stages = lock_stages(lock).values()
    outputs = {out["path"] for stage in stages for out in stage.get("outs", [])}
    paths = {dependency["path"] for stage in stages for dependency in stage.get("deps", [])} - outputs
    return sorted(
        path
        for path in paths
        if "://" not in path
        and not path.startswith(("/", f"{_RAW}/"))
        and path != _RAW
        and ".." not in PurePosixPath(path).parts
        and not any(path.startswith(f"{output}/") for output in outputs)
    )


def belongs(name: str, places: list[str]) -> bool:
    """Whether a file of this name is of a project whose stages depend on `places`: the rule for writing and reading."""
    if name in FILES or name == CONFIG:
        return True
    file = PurePosixPath(name)
    if name.lower().endswith(".dvc"):
        return is_ordinary(name[:-4]) and (str(file.parent) in (".", "data") or name.startswith(f"{_RAW}/"))
    if name.startswith(f"{_RAW}/"):
        return is_ordinary(name) and file.name in _DOT_FILES
    return is_ordinary(name) and any(name == place or name.startswith(f"{place}/") for place in (*DIRECTORIES, *places))


def is_ordinary(path: str) -> bool:
    """Whether a path stays in the project, is no file of DVC's, and nothing that a tool reads without being asked.

    Beside the package, `src` holds nothing: it is on the import path of whoever installed the project as editable.
    """
    parts = path.split("/")
    dots = [part for part in parts if part.startswith(".")]
    hidden = dots and not (dots == parts[-1:] and parts[-1] in _DOT_FILES)
    imported = parts[0].lower() == "src" and parts[:2] != ["src", "darkroom"]
    read = any(_BY_ITSELF.fullmatch(part) for part in parts) or parts[-1].lower().endswith(".dvc")
    return all(parts) and path.isprintable() and not re.search(r"[\\:]", path) and not (hidden or imported or read)


def lock_stages(content: bytes) -> dict[str, dict[str, Any]]:
    """The stages of a `dvc.lock`; empty if it cannot be read or is none."""
    try:
        stages: dict[str, dict[str, Any]] = parse_yaml(content.decode())["stages"]
        entries = [entry for stage in stages.values() for entry in (*stage.get("deps", []), *stage.get("outs", []))]
        return stages if all(isinstance(entry["path"], str) for entry in entries) else {}
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def pack(files: dict[str, bytes]) -> bytes:
    """A zip whose bytes depend on names and contents alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, on every machine
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, bytes]:
    """The files of a snapshot. Raises StageFailed for anything that `pack` does not make: no name is trusted."""
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_TOTAL:
                raise StageFailed(f"the project snapshot is larger than {_MAX_TOTAL >> 20} MiB")
            for entry in archive.infolist():
                if not is_safe(entry) or entry.filename in files:
                    raise StageFailed(f"the project snapshot holds {entry.filename!r}, which no project has")
                files[entry.filename] = archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise StageFailed(f"the project snapshot cannot be unpacked: {first_line(error)}") from None
    return files


def is_safe(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is a plain file that stays below the directory it is unpacked in, and outside .git and .dvc."""
    name = entry.orig_filename
    parts = name.split("/")
    plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
    inside = not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\\x00-\x1f:]", name)
    lower = [part.lower() for part in parts]
    hidden = ".git" in lower or (lower[0] in (".dvc", ".darkroom") and name != CONFIG)
    return plain and inside and not hidden and entry.file_size <= _MAX_TOTAL


def log_snapshot(client: "MlflowClient", run_id: str, content: bytes) -> str:
    """Keep a snapshot in a run, once; return its digest."""
    digest = digest_bytes(content)
    name = f"{digest}.zip"
    if f"{_ARTIFACTS}/{name}" not in {file.path for file in client.list_artifacts(run_id, _ARTIFACTS)}:
        with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
            (Path(directory) / name).write_bytes(content)
            client.log_artifact(run_id, str(Path(directory) / name), _ARTIFACTS)
    return digest


def fetch_snapshot(client: "MlflowClient", run_id: str, digest: str) -> dict[str, bytes]:
    """The files of a snapshot that a run holds. Raises StageFailed if it is not there or not the one of that digest."""
    from mlflow.exceptions import MlflowException

    name = f"{_ARTIFACTS}/{digest}.zip"
    try:
        with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
            content = Path(client.download_artifacts(run_id, name, directory)).read_bytes()
    except (MlflowException, OSError) as error:
        raise StageFailed(f"artifact {name} of run {run_id} cannot be fetched: {first_line(error)}") from None
    if digest_bytes(content) != digest:
        raise StageFailed(f"artifact {name} of run {run_id} was altered: its sha256 is {digest_bytes(content)[:12]}…")
    return unpack(content)
