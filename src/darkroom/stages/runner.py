"""What every stage shares: the exit code that says how it ended, and one clear line instead of a traceback."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from darkroom.disk import disk_error, sentence
from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.stages.following import follow
from darkroom.workspace import Workspace

DONE, FAILED, BAD_INPUT, INTERRUPTED, STOPPED = 0, 1, 2, 75, 130


def main(run: Callable[[Workspace], None], *, ranks: bool = False) -> None:
    """Run a stage in the project that holds the working directory and exit with its code; `DVC_STAGE` names it.

    `ranks` says that the stage can run on several processes, if `DARKROOM_NPROC` asks for them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("darkroom").setLevel(logging.INFO)
    # A stage that has nothing to save ends like Ctrl-C on SIGTERM too: outputs are only ever renamed into place.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = os.environ.get("DVC_STAGE", Path(sys.argv[0]).stem)
    if ranks:
        from darkroom.stages.launch import on_ranks

        sys.exit(on_ranks(run, name))
    sys.exit(outcome(run, name))


def outcome(run: Callable[[Workspace], None], name: str, say: Callable[[str], None] | None = None) -> int:
    """The exit code of `run`; what went wrong goes to `say`, or else to stderr with `name` before each line.

    It ends with the DVC that started it. Defects keep their traceback (exit code 1).
    """
    say = say or (lambda text: print(*(f"{name}: {line}" for line in text.splitlines()), sep="\n", file=sys.stderr))
    try:
        follow()
        run(Workspace.find())
    except InputError as error:
        say(str(error))
        return BAD_INPUT
    except (StageFailed, FloatingPointError) as error:  # the second is a network's that returned NaN
        say(str(error))
        return FAILED
    except Interrupted as error:
        say(str(error))
        return INTERRUPTED
    except KeyboardInterrupt:
        say("interrupted; nothing half-written is left")
        return STOPPED
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        say(sentence(found))
        return FAILED
    return DONE
