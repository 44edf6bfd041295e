"""A stage on several processes: `DARKROOM_NPROC=8 dvc repro` makes it start itself under torch's elastic launcher.

The stage that DVC started becomes the launcher and computes nothing; its ranks run the same command. However they end,
it ends with their exit code and says what one process would have said. Over several machines torchrun's own settings
hold: PET_NNODES, PET_RDZV_BACKEND, PET_RDZV_ENDPOINT, PET_RDZV_ID and the rest.
"""

import contextlib
import ctypes
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.stages.following import LAUNCHER, end_after
from darkroom.stages.runner import BAD_INPUT, DONE, FAILED, INTERRUPTED, STOPPED, outcome
from darkroom.training.distributed import RankLost
from darkroom.workspace import Workspace

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where the launcher looks for what a rank has to say
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ENDED = (STOPPED, -signal.SIGTERM, -signal.SIGINT)  # how a process ends that is told to and has nothing to save

Run = Callable[[Workspace], None]


def on_ranks(run: Run, name: str) -> int:
    """Run a stage here, or on as many processes as the environment asks for; returns its exit code, like `outcome`."""
    if LAUNCHER in os.environ:
        return _as_rank(run, name)

    def run_or_start(workspace: Workspace) -> None:
        if count := ranks_to_start():
            start_ranks(count)
        else:
            run(workspace)

    return outcome(run_or_start, name)


def ranks_to_start() -> int:
    """`DARKROOM_NPROC`, the processes to start on this machine; 0 to start none. Raises InputError."""
    if "LOCAL_RANK" in os.environ:  # this is one already: torchrun itself was called
        return 0
    text = os.environ.get("DARKROOM_NPROC") or "1"
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise InputError(f"DARKROOM_NPROC = {text!r}: expected the number of processes on this machine, 1 or more")
    nodes = os.environ.get("PET_NNODES") or "1"
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in nodes.split(":")):
        raise InputError(f"PET_NNODES = {nodes!r}: expected the number of machines, 1 or more")
    return int(text) if int(text) > 1 or nodes not in ("1", "1:1") else 0


def start_ranks(count: int) -> None:
    """Run this process's own command on `count` ranks, and end as they did: return, or raise what they raised.

    SIGTERM and SIGINT go to the ranks, which have all the time they need to save.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = ["--module", spec.name] if spec else [sys.argv[0]]
    with contextlib.ExitStack() as stack:
        # DVC and Prefect repeat, so the launcher does not. Its own handlers would give ranks 30 s and lose their codes.
        options = [f"--nproc-per-node={count}", "--max-restarts=0", "--signals-to-handle=SIGQUIT"]
        if os.environ.get("PET_NNODES", "1") in ("", "1", "1:1"):
            options += ["--standalone", "--local-addr=127.0.0.1"]
        if "PET_LOG_DIR" not in os.environ:
            options.append(f"--log-dir={stack.enter_context(tempfile.TemporaryDirectory(prefix='darkroom-ranks-'))}")
        arguments = _parsed([*options, *command, *sys.argv[1:]])
        # A share of the threads that one process would have; more would only get in each other's way.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
        os.environ[LAUNCHER] = str(os.getpid())
        if "LOGLEVEL" not in os.environ:
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)
        stopped = stack.enter_context(_passing_signals_on())
        try:
            torchrun.run(arguments)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            failures = error.failures
        except (RendezvousError, TimeoutError, ValueError) as error:
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise StageFailed(f"the ranks did not come together: {said}; look at PET_NNODES and PET_RDZV_…") from None
        else:
            return
    _raise_as(failures, stopped.is_set())


def _parsed(arguments: list[str]) -> Any:
    """What torchrun makes of arguments and PET_ variables."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return torchrun.parse_args(arguments)  # type: ignore[no-untyped-call]
    except (SystemExit, ValueError) as error:
        last = (said.getvalue().strip() or str(error)).splitlines()[-1]
        raise InputError(f"torchrun refuses a PET_ variable: {last}") from None


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[threading.Event]:
    """Send SIGTERM and SIGINT to the ranks, which are in sessions of their own; before there are any, stop here.

    The event tells whether there was such a signal.
    """
    stopped = threading.Event()

    def pass_on(number: int, frame: object) -> None:
        stopped.set()
        ranks = psutil.Process().children()
        if not ranks:
            raise KeyboardInterrupt
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_as(failures: Mapping[int, ProcessFailure], stopped: bool) -> None:
    """Raise what made the stage fail; `failures` by rank, `stopped` from outside. The first counts, unless it followed
    from another one: ranks that lost that one, and ranks that were ended for its sake."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        rank, failure = item
        followed = 0
        if failure.exitcode in _ENDED:
            followed = 1 if stopped else 2
        elif failure.error_file_data.get("kind") == RankLost.__name__:
            followed = 2 if stopped else 1
        return followed, failure.timestamp, rank

    rank, first = min(failures.items(), key=order)
    code, said = first.exitcode, first.error_file_data
    if code in _ENDED:
        raise KeyboardInterrupt
    if code < 0:
        why = f"rank {rank} (process {first.pid}) was killed by {first.signal_name()}"
        raise StageFailed(f"{why}, so the others were ended; the same command carries on")
    if code == BAD_INPUT and "kind" in said:
        raise InputError(said["message"])
    if code == INTERRUPTED:
        raise Interrupted(said.get("message") or "interrupted")
    if said.get("traceback"):
        print(said["traceback"], end="", file=sys.stderr)
        raise StageFailed(f"rank {rank}: {said['message']}")
    raise StageFailed(said.get("message") or f"rank {rank} ended with exit code {code}")


def _as_rank(run: Run, name: str) -> int:
    """Run a stage as one of several ranks. What goes wrong is told to the launcher; of the rest only rank 0 speaks."""
    _die_with_launcher()
    if os.environ["RANK"] != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process)
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")

    def told(workspace: Workspace) -> None:
        try:
            run(workspace)
        except BaseException as error:
            _tell(error)
            raise

    try:
        code = outcome(told, name, say=lambda text: None)
    except Exception:  # a defect; the launcher prints its traceback, once
        code = FAILED
    sys.stdout.flush()
    if code not in (DONE, INTERRUPTED):
        os._exit(code)  # the others may be anywhere: torch's own clean-up would abort or never end
    return code


def _tell(error: BaseException) -> None:
    """Leave `error` where the launcher looks, in torch's own form with a few words more."""
    known = isinstance(error, (InputError, StageFailed, Interrupted, KeyboardInterrupt))
    content = {
        "kind": type(error).__name__,
        "message": str(error) if known else traceback.format_exception_only(error)[-1].strip(),
        "timestamp": int(time.time()),
        "traceback": None if known else "".join(traceback.format_exception(error)),
    }
    Path(os.environ[_ERROR_FILE]).write_text(json.dumps(content), encoding="utf-8")


def _die_with_launcher() -> None:
    """End this rank when its launcher dies in a way that cannot be noticed, by SIGKILL say: on Linux by the kernel."""
    launcher = int(os.environ[LAUNCHER])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    elif psutil.pid_exists(launcher):
        end_after([psutil.Process(launcher)], signal.SIGKILL)
    if os.getppid() != launcher:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
