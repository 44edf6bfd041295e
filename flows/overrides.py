"""Values of a checkout's params.yaml replaced for one run, by dotted keys, and judged by that checkout's own code."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from darkroom.errors import InputError
from darkroom.files import write_text
from darkroom.yaml_text import parse_yaml
from flows.processes import run


def override(root: Path, params: Mapping[str, Any]) -> None:
    """Replace values in `params.yaml` of the project at `root`; every other character of it stays.

    Raises InputError, with a line per mistake, for what the project does not take for parameters.
    """
    if not params:
        return
    path = root / "params.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        parse_yaml(text)  # within bounds, which what follows has not
        for key, value in params.items():
            text = replaced(text, key.split("."), value)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"params.yaml: cannot be read: {' '.join(str(error).split())}") from None
    write_text(path, text)
    ended = run([sys.executable, "-P", "-m", "darkroom", "params"], root, log=lambda line: None)
    if ended.code != 0:
        said = [line.removeprefix("darkroom: ") for line in ended.lines if line.startswith("darkroom: ")]
        raise InputError("\n".join(said) or f"params.yaml: {ended.lines[-1] if ended.lines else 'refused'}")


def replaced(text: str, keys: list[str], value: Any) -> str:
    """YAML text with the value at `keys` replaced, or added if it is not there: the check names it then."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for number, key in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            group = ".".join(keys[:number]) or "params.yaml"
            raise InputError(f"params.yaml: {'.'.join(keys)}: {group} is no group of parameters")
        found = next((inner for name, inner in node.value if name.value == key), None)
        if found is None:
            content = yaml.safe_load(text)
            place = content
            for name in keys[:-1]:
                place = place.setdefault(name, {})
            place[keys[-1]] = value
            return yaml.safe_dump(content, sort_keys=False)
        node = found
    assert node is not None  # there was a key
    before, old, after = (
        text[: node.start_mark.index],
        text[node.start_mark.index : node.end_mark.index],
        text[node.end_mark.index :],
    )
    space = "" if old else " "  # nothing, which is null, stands right behind the colon
    end = "\n" if old.endswith("\n") else ""
    return before + space + _inline(".".join(keys), value) + end + after


def _inline(key: str, value: Any) -> str:
    """A value as JSON, which is YAML on one line."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):
        raise InputError(f"params.yaml: {key} = {value!r}: expected a value that JSON has") from None
