"""What a version brings, judged before any of it is written: whoever may register a version is not trusted with more.

Its files are those that a project has. DVC, told to bring its outputs, can then write below the project alone, run
nothing, and reach only remotes that the user's project names or the user agrees to.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from darkroom.errors import StageFailed
from darkroom.params_errors import shortened, shown
from darkroom.registry.dvc_config import Config, offered_config, place_of, portable_config, read_config, write_config
from darkroom.registry.dvc_outputs import reading
from darkroom.registry.snapshot import CONFIG, LOCK, PARAMS, belongs, dependencies, is_ordinary
from darkroom.yaml_text import parse_yaml

_SECONDS = 120.0  # for DVC to read a pipeline
_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")
_ENVIRONMENT = {"bin", "lib", "lib64", "scripts"}  # of a Python environment, beside its pyvenv.cfg


@dataclass(frozen=True)
class Offer:
    """What a version brings, all of it in order."""

    files: dict[str, bytes]
    config: Config  # the remotes that this user does not have, and the default where there is none
    places: list[str]  # that DVC would ask for data and that this user's configuration does not name

    def without(self, places: set[str]) -> Config:
        """The configuration without the remotes at `places`."""
        left = {name: values for name, values in self.config.items() if place_of(values) not in places}
        dropped = {f'remote "{values["remote"]}"' for values in [left.get("core", {})] if "remote" in values}
        if dropped & (self.config.keys() - left.keys()):
            left["core"] = {key: value for key, value in left["core"].items() if key != "remote"}
        return {name: values for name, values in left.items() if values}


def inspect(root: Path, brought: dict[str, bytes]) -> Offer:
    """Judge a version's files for the directory `root`, which stays as it is.

    Raises StageFailed, naming it, for a file that no project has or that lies in a Python environment here, for a YAML
    file beyond the bounds, for configuration that is more than a remote's place, for a pipeline that DVC cannot read or
    whose outputs lie outside the project or where code or configuration is read from, and for data that is imported
    from another repository or a database.
    """
    files = {name: content for name, content in brought.items() if name != CONFIG}
    offered = offered_config(brought.get(CONFIG, b""))
    _check_files(root, files)
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        place = Path(directory).resolve()
        own = {"no_scm": "true", "site_cache_dir": str(place / ".dvc/site")}
        for name, content in (files | {CONFIG: write_config({"core": own}).encode()}).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        declared = reading(place, "declared", _SECONDS)
    for entry in declared["entries"]:
        _check_entry(root, entry)

    mine = [read_config(root / ".dvc" / name) for name in ("config", "config.local")]
    named = {section for config in mine for section in config} | {f'remote "{name}"' for name in declared["remotes"]}
    known = {place_of(values) for values in (*portable_config(root).values(), *declared["remotes"].values())}
    config = {section: values for section, values in offered.items() if section not in named}
    core = {key for found in mine for key in found.get("core", {})}
    config["core"] = {key: value for key, value in offered.get("core", {}).items() if key not in core}
    asked = {place_of(values) for name, values in config.items() if name != "core"}
    asked |= {entry["path"] for entry in declared["entries"] if not entry["local"]}
    return Offer(files, {name: values for name, values in config.items() if values}, sorted(asked - known))


def _check_files(root: Path, files: dict[str, bytes]) -> None:
    places = dependencies(files.get(LOCK, b""))
    for name, content in files.items():
        if not belongs(name, places) or _in_environment(root, name):
            raise StageFailed(f"the version brings {shown(name)}, which no project has; nothing was written")
        if name in ("dvc.yaml", LOCK, PARAMS) or name.endswith(".dvc"):
            try:
                parse_yaml(content.decode())
            except (yaml.MarkedYAMLError, UnicodeDecodeError) as error:
                why = shortened(str(getattr(error, "problem", error)))
                raise StageFailed(f"the version's {name} cannot be read: {why}; nothing was written") from None


def _check_entry(root: Path, entry: dict[str, Any]) -> None:
    """Judge one dependency or output. Dependencies are only read."""
    where, path = f"stage {shown(entry['stage'])} of the version", entry["path"]
    if entry["kind"] == "import":
        what = f"takes {shown(path)} from another repository or a database, which a checkout does not follow"
        raise StageFailed(f"{where} {what}; nothing was written")
    if entry["kind"] == "output":
        if not entry["local"] or not is_ordinary(path) or _in_environment(root, path):
            raise StageFailed(f"{where} writes {shown(path)}, which is no place for an output; nothing was written")
        _check_listing(root, path, [(None, entry["digest"]), *entry["files"]])


def list_outputs(root: Path) -> list[dict[str, Any]]:
    """The pipeline's outputs with the files in them, from DVC's cache or its remote: `path`, `files`, `error`.

    `files` is None where a directory's listing is not to be had. Raises StageFailed for a listing that leads elsewhere:
    DVC would follow it.
    """
    entries: list[dict[str, Any]] = reading(root, "listed")
    for entry in entries:
        _check_listing(root, entry["path"], entry["files"] or [])
    return entries


def _check_listing(root: Path, path: str, files: list[tuple[str | None, str | None]]) -> None:
    """Raise StageFailed if files of the output at `path` lie elsewhere, or their digests, which are paths in the cache.

    Each file is its name in the output, None for the output itself, and its digest.
    """
    for name, digest in files:
        parts = [] if name is None else name.split("/")
        inside = not any(part in ("", ".", "..") or "\0" in part or part.lower() == ".git" for part in parts)
        file = "/".join([path, *parts])
        if not inside or _in_environment(root, file) or not (digest is None or _DIGEST.fullmatch(digest)):
            raise StageFailed(f"output {shown(file)} of the version, digest {shown(digest)}, is none that DVC makes")


def _in_environment(root: Path, name: str) -> bool:
    """Whether a path is where a Python environment in `root` keeps programs: this command may be one of them."""
    parts = name.split("/")
    return any(
        part.lower() in _ENVIRONMENT and root.joinpath(*parts[:level], "pyvenv.cfg").exists()
        for level, part in enumerate(parts)
    )
