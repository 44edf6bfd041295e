"""Commands of a workspace's own `darkroom`, whose answer is JSON: the commit that made a model also handles it."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.registry.tracking import RegistryUnavailable
from flows.processes import run

_PREFIX = "darkroom: "
_JSON = re.compile(r"^[\[{].*", re.DOTALL | re.MULTILINE)  # progress comes before it


def answer(root: Path, *arguments: str, log: Callable[[str], None] = print, ok: Sequence[int] = (0,)) -> Any:
    """What `darkroom ARGUMENTS --json` answers in the project at `root`; what it says besides goes to `log`.

    Raises, with what it said last, InputError, Interrupted, RegistryUnavailable or StageFailed, as its exit code says;
    `ok` are those with an answer.
    """
    ended = run([sys.executable, "-P", "-m", "darkroom", *arguments, "--json"], root, log=log, apart=True)
    if ended.code in ok and (found := _JSON.search(ended.answer)):
        try:
            return json.loads(found[0])
        except ValueError:
            raise StageFailed(f"darkroom {arguments[0]} --json: what it printed is no JSON: {found[0][:200]}") from None
    said = [line.removeprefix(_PREFIX) for line in ended.lines if line.startswith(_PREFIX)]
    last = "\n".join(said) or next((line for line in reversed(ended.lines) if line), "no output")
    if ended.code == 2:
        raise InputError(last)
    if ended.code == 75:
        raise Interrupted(last)
    if ended.code == RegistryUnavailable.exit_code:
        raise RegistryUnavailable(last)
    raise StageFailed(last if said and ended.code == 1 else f"darkroom {arguments[0]} ended with {ended.code}: {last}")
