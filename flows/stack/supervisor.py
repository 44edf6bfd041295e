"""Keeps services running: starts each when what it needs is well, again if it dies, and stops all in order.

All in one thread that looks at everything a few times a second. If the supervisor itself is killed, `leash` ends what
it had started.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from darkroom.errors import StageFailed
from darkroom.files import write_json
from flows.processes import end_group, leash
from flows.stack.services import Service

_LOOK = 0.2  # seconds between two looks
_CHECK = 5.0  # seconds between two health checks of a service that is well
_TRIES = 3  # starts of a service that has not been well yet, before the stack gives up
_LONGEST_PAUSE = 30.0
_MISSES = 3  # health checks in a row, after which a service counts as silent
_LONGEST_LOG = 10 << 20  # bytes; the one before is kept

Condition = Literal["waiting", "starting", "well", "silent", "stopped", "down", "done"]


@dataclass
class Running:
    """What the supervisor knows of one service."""

    service: Service
    condition: Condition = "waiting"
    process: "subprocess.Popen[bytes] | None" = None
    lifetime: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    began: float = 0.0
    next_check: float = 0.0
    next_start: float = 0.0
    failures: int = 0  # since it was well for the last time
    was_well: bool = False
    misses: int = 0


class Supervisor:
    """Runs services; in `directory` are `logs/`, `stopped/` (names of services to leave alone) and `running.json`."""

    def __init__(self, services: Sequence[Service], root: Path, directory: Path, say: Callable[[str], None]) -> None:
        self._all = {service.name: Running(service) for service in services}
        self._root = root
        self._directory = directory
        self._say = say
        self._asked = 0  # how often it was asked to stop
        self._written: object = None
        self._pause = float(os.environ.get("DARKROOM_STACK_RESTART_SECONDS") or 1)

    def run(self, ready: Callable[[float], None]) -> None:
        """Start everything, call `ready` with the seconds that it took, and watch until SIGINT or SIGTERM; then stop.

        Raises StageFailed, with everything stopped, if a service does not come up at all.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        for name in ("logs", "stopped"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        for name in self._all:
            self._held(name).unlink(missing_ok=True)
        began, told = time.monotonic(), False
        try:
            while not self._asked:
                for running in self._all.values():
                    self._look(running)
                self._write()
                if not told and all(running.condition in ("well", "done") for running in self._all.values()):
                    told = True
                    ready(time.monotonic() - began)
                time.sleep(_LOOK)
        finally:
            for running in reversed(self._all.values()):
                self._stop(running)
            self._write()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked += 1

    def _held(self, name: str) -> Path:
        return self._directory / "stopped" / name

    def _look(self, running: Running) -> None:
        """Do what one service needs now."""
        now, name = time.monotonic(), running.service.name
        if running.condition == "done":
            return
        if self._held(name).exists():
            if running.condition != "stopped":
                self._stop(running)
                running.condition = "stopped"
                self._say(f"{name}: stopped, as asked")
        elif running.process is None:
            if now >= running.next_start and all(
                self._all[n].condition in ("well", "done") for n in running.service.needs
            ):
                self._start(running)
        elif (code := running.process.poll()) is not None:
            self._ended(running, code)
        elif now >= running.next_check:
            self._check(running)

    def _start(self, running: Running) -> None:
        service = running.service
        service.prepare()
        with self._log(service.name).open("ab") as log:
            running.process = subprocess.Popen(
                service.command,
                cwd=self._root if service.user is None else "/",
                env=service.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=service.user,
                group=service.user,
                extra_groups=[] if service.user else None,
            )
        running.lifetime.enter_context(leash(f"-{running.process.pid}", service.grace))
        running.condition, running.began = "starting", time.monotonic()
        running.next_check = running.began

    def _check(self, running: Running) -> None:
        """Notice that a service is well, or no longer answers."""
        if running.service.once:
            return
        name, well = running.service.name, running.service.healthy()
        self._shorten_log(name)
        running.misses = 0 if well else running.misses + 1
        if well and running.condition != "well":
            if running.was_well:
                self._say(f"{name}: well again")
            running.condition, running.was_well, running.failures = "well", True, 0
        elif running.condition == "well" and running.misses == _MISSES:
            running.condition = "silent"
            self._say(f"{name}: runs but does not answer; its log is {self._log(name)}")
        running.next_check = time.monotonic() + (_CHECK if running.condition == "well" else 2 * _LOOK)

    def _ended(self, running: Running, code: int) -> None:
        """Let a service that died start again after a pause; a command that succeeded is done."""
        name = running.service.name
        self._stop(running)
        if running.service.once and code == 0:
            running.condition = "done"
            return
        running.failures += 1
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        if not running.was_well and running.failures >= _TRIES:
            raise StageFailed(f"{name} does not start: {how}: {self._last_line(name)}; its log is {self._log(name)}")
        pause = min(self._pause * 2 ** (running.failures - 1), max(self._pause, _LONGEST_PAUSE))
        running.condition, running.next_start = "down", time.monotonic() + pause
        self._say(f"{name}: {how}, starts again in {pause:g} s: {self._last_line(name)}")

    def _stop(self, running: Running) -> None:
        """End a service and all that it has left; a second request to stop does not wait."""
        process, service = running.process, running.service
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, service.stop)
        deadline = time.monotonic() + service.grace
        while process.poll() is None and time.monotonic() < deadline and self._asked < 2:
            time.sleep(0.05)
        end_group(process.pid, 0)
        process.wait()
        running.lifetime.close()
        running.process, running.condition = None, "waiting"

    def _log(self, name: str) -> Path:
        return self._directory / "logs" / f"{name}.log"

    def _shorten_log(self, name: str) -> None:
        """Begin a log anew that has become long; the service goes on writing at its end, wherever that is."""
        log = self._log(name)
        if log.stat().st_size > _LONGEST_LOG:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)

    def _last_line(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def _write(self) -> None:
        """What `status` reads, when it has changed."""
        state = {
            "supervisor": os.getpid(),
            "services": {
                name: {
                    "condition": running.condition,
                    "pid": running.process.pid if running.process else None,
                    "shows": running.service.shows,
                }
                for name, running in self._all.items()
            },
        }
        if state != self._written:
            write_json(self._directory / "running.json", state)
            self._written = state
