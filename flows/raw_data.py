"""Raw data of workspaces: fetched once for all of them, and in each as hard links.

`state/raw/SOURCE` mirrors one S3 source. It is a project just large enough for `darkroom data sync`, which keeps an
index there, carries on after an interruption, and never changes a file in place: a workspace keeps what it has linked.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import InputError, StageFailed
from darkroom.files import digest_bytes, write_bytes
from darkroom.workspace import Workspace
from darkroom.yaml_text import parse_yaml
from flows.darkroom_command import answer
from flows.dvc_stage import dvc
from flows.locks import locked, locked_if_free
from flows.settings import Settings

_PASSES = ("cannot reach ", "overloaded or out of order", "the connection broke off", "while it was fetched")

KEEP = 2  # mirrors: the source of now and the one before

_SCRATCH = (".part", ".part.json", ".journal", ".tmp")  # of a fetch under way; these alone are written in place


@dataclass(frozen=True)
class Synced:
    """What a sync found and did, in files and bytes."""

    uri: str
    files: int
    bytes: int
    new: int
    changed: int
    removed: int


def source_of(root: Path) -> str:
    """`data.source` of the project at `root`; empty if its parameters cannot be read, which others will say."""
    try:
        return str(parse_yaml((root / "params.yaml").read_text(encoding="utf-8"))["data"]["source"])
    except Exception:
        return ""


def link(settings: Settings, root: Path) -> None:
    """Give the workspace at `root` the raw data that is here already: of the mirror of its source, else the project's.

    What git brought stays. Directories that a `.dvc` file of the workspace stands for are left to DVC.
    """
    mirror = _mirror(settings, source_of(root))
    if mirror.is_dir():
        with locked(mirror):
            _link_tree(Workspace(mirror).raw, Workspace(root).raw)
    else:
        _link_tree(Workspace(settings.project).raw, Workspace(root).raw)


def sync(settings: Settings, root: Path, log: Callable[[str], None] = print) -> Synced | None:
    """Bring the workspace's raw data up to date with S3; None for a source that is not there.

    What DVC tracks of the raw data comes from its cache or its remote. Raises StageFailed for what a later attempt may
    find mended, a server that does not answer or an object that changed meanwhile, and InputError for whatever else
    keeps the data from being fetched.
    """
    raw, source = Workspace(root).raw, source_of(root)
    if tracked := [path for path in (raw.with_name(f"{raw.name}.dvc"), *raw.rglob("*.dvc")) if path.is_file()]:
        dvc(root, "pull", *(str(path.relative_to(root)) for path in tracked), log=log)
    if not source.startswith("s3://"):
        return None
    mirror = _mirror(settings, source)
    mirror.mkdir(parents=True, exist_ok=True)
    with locked(mirror):
        _make_project(mirror, root)
        if not any(Workspace(mirror).raw.iterdir()):  # the project may have synced by hand
            _link_tree(Workspace(settings.project).raw / "s3", Workspace(mirror).raw / "s3")
        try:
            found = answer(mirror, "data", "sync", log=log)
        except InputError as error:  # the command has one exit code for all of S3
            if passes(error):
                raise StageFailed(str(error)) from None
            raise
        # Not `new` and `changed`: another run may have fetched between this one's link and its sync.
        shutil.rmtree(Workspace(root).raw / "s3", ignore_errors=True)
        _link_tree(Workspace(mirror).raw, Workspace(root).raw)
    return Synced(**found)


def passes(error: InputError) -> bool:
    """Whether what S3 answered, or that it did not, may be otherwise in a minute."""
    return any(words in str(error) for words in _PASSES)


def prune(settings: Settings) -> None:
    """Remove the mirrors of sources that were not used lately, all but `KEEP`; never one in use."""
    for mirror in newest_first(settings.raw)[KEEP:]:
        with locked_if_free(mirror) as free:
            if free:
                shutil.rmtree(mirror, ignore_errors=True)


def newest_first(directory: Path) -> list[Path]:
    """The directories in `directory`, by the time of their last change."""
    found: list[tuple[float, Path]] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        try:
            if path.is_dir() and not path.is_symlink():
                found.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue  # another process removed it
    return [path for _, path in sorted(found, reverse=True)]


def _mirror(settings: Settings, source: str) -> Path:
    return settings.raw / digest_bytes(source.encode())[:16]


def _make_project(mirror: Path, root: Path) -> None:
    """What the workspace's own `darkroom` needs to fetch the workspace's source here."""
    write_bytes(mirror / "dvc.yaml", b"stages: {}\n")
    write_bytes(mirror / "params.yaml", (root / "params.yaml").read_bytes())
    (mirror / "src").unlink(missing_ok=True)
    (mirror / "src").symlink_to(root / "src")
    Workspace(mirror).raw.mkdir(parents=True, exist_ok=True)
    os.utime(mirror)


def _link_tree(source: Path, target: Path) -> None:
    for path, entry in _entries(source):
        place = target / path
        if os.path.lexists(place) or any(os.path.lexists(f"{target / part}.dvc") for part in (path, *path.parents)):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.is_symlink():
            place.symlink_to(Path(entry.path).resolve())
        else:
            _link(Path(entry.path), place)


def _entries(directory: Path, below: Path = Path()) -> "Iterator[tuple[Path, os.DirEntry[str]]]":
    """Files and symbolic links in `directory`, with their path in it. Nothing if it is not there."""
    if not directory.is_dir():
        return
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path), below / entry.name)
        elif not (entry.name.startswith(".") and entry.name.endswith(_SCRATCH)):
            yield below / entry.name, entry


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there cannot be one: on another filesystem, or of somebody else's file."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)
