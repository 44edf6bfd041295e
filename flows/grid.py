"""Grids of parameters: every combination, its name, and whether the project takes it."""

import itertools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from darkroom.errors import InputError
from darkroom.files import digest_json
from darkroom.params import load_params
from darkroom.yaml_text import parse_yaml
from flows.overrides import replaced

_LONGEST_NAME = 120  # of an experiment: it becomes a file's name in .git


def combinations(grid: Mapping[str, Sequence[Any]], most: int) -> list[dict[str, Any]]:
    """Every combination of the values, the last key changing fastest.

    Raises InputError for a grid without combinations, with the same value twice, or with more than `most`.
    """
    for key, values in grid.items():
        if isinstance(values, str | Mapping) or not values:
            raise InputError(f"{key} = {values!r}: expected a list of values to try")
        shown = [json.dumps(value, sort_keys=True) for value in values]
        if twice := next((value for value in shown if shown.count(value) > 1), None):
            raise InputError(f"{key}: {twice} is there twice")
    if not grid:
        raise InputError("an empty grid: expected parameters and their values, such as train.steps=500,1000")
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > most:
        raise InputError(f"{count:,} combinations: expected at most {most:,} (max_runs)")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def title(combination: Mapping[str, Any]) -> str:
    """A combination for people: train.steps=500, sample.guidance_scale=2.0."""
    return ", ".join(f"{key}={_shown(value)}" for key, value in combination.items())


def experiment_name(combination: Mapping[str, Any]) -> str:
    """The same as a name that Git takes; different ones for different combinations."""
    name = title(combination).replace(", ", ",")
    plain = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._=,+-]+", "-", name)).strip(".-")
    if plain == name and len(name) <= _LONGEST_NAME and not name.endswith(".lock"):
        return name
    return f"{plain[:_LONGEST_NAME].rstrip('.-')}-{digest_json(dict(combination))[:8]}"


def check(root: Path, grid: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings of values that have no effect, each with the first combination that has it.

    Raises InputError, with a line per mistake, unless the project at `root` can run every combination of the grid.
    """
    text = (root / "params.yaml").read_text(encoding="utf-8")
    mistakes: dict[str, str] = {}  # with the first combination that makes it
    warnings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "params.yaml"
        for combination in grid:
            try:
                changed = text
                for key, value in combination.items():
                    changed = replaced(changed, key.split("."), value)
                path.write_text(changed, encoding="utf-8")
                for line in load_params(path).train.warnings():
                    warnings.setdefault(line, title(combination))
            except InputError as error:
                for line in str(error).replace(str(path), path.name).splitlines():
                    mistakes.setdefault(line, title(combination))
    if mistakes:
        raise InputError("\n".join(f"{line} ({combination})" for line, combination in mistakes.items()))
    return [f"{line} ({combination})" for line, combination in warnings.items()]


def parse(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """A grid from words like `train.steps=100,200`. Raises InputError for other words and for a key twice."""
    grid: dict[str, list[Any]] = {}
    for word in arguments:
        key, equals, values = word.partition("=")
        try:
            parsed = parse_yaml(f"[{values}]")
        except yaml.YAMLError:
            parsed = None
        if not (key and equals and values and isinstance(parsed, list)):
            raise InputError(f"{word!r}: expected key=value,value such as train.steps=500,1000")
        if key in grid:
            raise InputError(f"{key} is there twice; all of its values belong together: {key}=a,b")
        grid[key] = parsed
    return grid


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
