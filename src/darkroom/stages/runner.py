"""What every stage shares: the exit code that says how it ended, and one clear line instead of a traceback."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.workspace import Workspace

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


def main(run: Callable[[Workspace], None]) -> None:
    """Run a stage in the project that holds the working directory and exit with its code; `DVC_STAGE` names it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("darkroom").setLevel(logging.INFO)
    # A stage that has nothing to save ends like Ctrl-C on SIGTERM too: outputs are only ever renamed into place.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(outcome(run, os.environ.get("DVC_STAGE", Path(sys.argv[0]).stem)))


def outcome(run: Callable[[Workspace], None], name: str) -> int:
    """The exit code of `run`; what went wrong is printed to stderr. Defects keep their traceback (exit code 1)."""
    try:
        run(Workspace.find())
    except InputError as error:
        print(*(f"{name}: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return BAD_INPUT
    except StageFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except Interrupted as error:
        print(f"{name}: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    return DONE
