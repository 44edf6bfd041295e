"""DVC's configuration as values: what of it leads others to the remotes, and reading and writing its files."""

import configparser
import re
from pathlib import Path
from urllib.parse import urlsplit

from darkroom.errors import InputError, StageFailed
from darkroom.params_errors import shown
from darkroom.registry.tracking import first_line

_FILE = ".dvc/config"
_KEPT_KEYS = {"url", "endpointurl", "region", "version_aware"}  # of a remote
_KEPT_LOCAL_KEYS = {"url", "endpointurl", "region"}  # of a remote in this machine's own configuration
_KEPT_CORE_KEYS = {"remote", "analytics", "check_update"}
_SCHEMES = {"s3", "gs", "azure", "oss", "http", "https", "webdav", "webdavs", "ssh", "hdfs", "webhdfs", "gdrive"}
_VALUE = re.compile(r"""([^"'#%,$\\`]|%[0-9A-Fa-f]{2})+""")  # without what a configuration file gives a meaning
_REMOTE = re.compile(r"""'?remote "(?P<name>[^"]+)"'?""")  # a section, as DVC writes it and as git would

Config = dict[str, dict[str, str]]  # section -> key -> value; a remote's section is `remote "NAME"`


def portable_config(root: Path) -> Config:
    """What of DVC's configuration leads others to the remotes: places and names, no credentials, no local paths."""
    shared, local = (read_config(root / ".dvc" / name) for name in ("config", "config.local"))
    found: Config = {}
    for config, kept in ((local, _KEPT_LOCAL_KEYS), (shared, _KEPT_KEYS)):
        for section, values in config.items():
            if _REMOTE.fullmatch(section):
                taken = {key: value for key, value in values.items() if key in kept}
                found[section] = found.get(section, {}) | {
                    key: _place(value, root) if key in ("url", "endpointurl") else value for key, value in taken.items()
                }
    core = {key: value for key, value in shared.get("core", {}).items() if key in _KEPT_CORE_KEYS}
    default = core.get("remote") or local.get("core", {}).get("remote")
    core |= {"remote": default} if default else {}
    return {name: values for name, values in sorted({"core": core, **found}.items()) if values}


def offered_config(content: bytes) -> Config:
    """What of a version's configuration is taken over: the keys that `portable_config` keeps.

    Raises StageFailed for what it never writes: other sections and keys of a remote (one may name a command), values
    that would become more than a value, places that are neither absolute nor a URL of a kind that DVC moves data with.
    """
    try:
        config = parse_config(content.decode())
    except (ValueError, configparser.Error) as error:
        raise StageFailed(f"the version's {_FILE} cannot be read: {first_line(error)}") from None
    found: Config = {}
    for section, values in config.items():
        remote = _REMOTE.fullmatch(section)
        allowed = _KEPT_KEYS if remote else _KEPT_CORE_KEYS
        foreign = sorted(values.keys() - allowed - {"profile"}) if remote else []  # earlier versions have profiles
        if foreign or not (section == "core" or (remote and re.fullmatch(r"\w[\w .-]*", remote["name"], re.ASCII))):
            raise StageFailed(
                f"the version's {_FILE} sets {shown(' '.join([section, *foreign]))}, which no version has"
            )
        found[section] = {key: value for key, value in values.items() if key in allowed}
        for key, value in found[section].items():
            if not _VALUE.fullmatch(value) or not value.isprintable() or not _leads_to_data(key, value):
                raise StageFailed(f"the version's {_FILE} sets {section} {key} = {shown(value)}, which no version has")
    return {section: values for section, values in found.items() if values}


def _leads_to_data(key: str, value: str) -> bool:
    scheme, separator, rest = value.partition("://")
    if key == "endpointurl":
        return scheme in ("http", "https") and not rest.startswith("-")
    if key == "url":
        return (scheme in _SCHEMES and not rest.startswith("-")) if separator else value.startswith("/")
    return True


def place_of(values: dict[str, str]) -> str:
    """Where a remote is, in one word: its URL and, where it is not the usual one, the server behind it."""
    return ",".join(values[key] for key in ("url", "endpointurl") if key in values)


def _place(url: str, root: Path) -> str:
    """A remote's URL without password and query, where tokens are; a path, which is relative to .dvc, made absolute."""
    if "://" not in url:
        return str((root / ".dvc" / url).resolve())
    parts = urlsplit(url)
    if parts.password:
        parts = parts._replace(netloc=f"{parts.username}@{parts.netloc.rpartition('@')[2]}")
    if parts.scheme.startswith(("http", "webdav")):
        parts = parts._replace(query="", fragment="")
    return parts.geturl()


def read_config(path: Path) -> Config:
    """A configuration file of DVC's; empty if there is none. Raises InputError if it cannot be read."""
    try:
        return parse_config(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, configparser.Error) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None


def parse_config(text: str) -> Config:
    """The sections of DVC's configuration. Raises configparser.Error."""
    parser = configparser.RawConfigParser(strict=False)
    parser.read_string(text)
    return {_named(section): dict(parser.items(section)) for section in parser.sections()}


def write_config(config: Config) -> str:
    """The text of a configuration file that DVC reads."""
    return amend("", config)


def amend(text: str, added: Config) -> str:
    """The text of a configuration file with further sections and keys; what it has, comments included, stays."""
    lines = text.splitlines()
    for section, values in added.items():
        entries = [f"    {key} = {value}" for key, value in sorted(values.items())]
        at = next((number for number, line in enumerate(lines) if _section(line) == section), None)
        if at is None:
            lines += [f"['{section}']" if _REMOTE.fullmatch(section) else f"[{section}]", *entries]
        else:
            lines[at + 1 : at + 1] = entries
    return "\n".join([*lines, ""])


def _section(line: str) -> str | None:
    """The section that a line begins, if it begins one."""
    header = re.fullmatch(r"\[(.+)\]", line.strip())
    return None if header is None else _named(header[1])


def _named(section: str) -> str:
    match = _REMOTE.fullmatch(section)
    return f'remote "{match["name"]}"' if match else section
