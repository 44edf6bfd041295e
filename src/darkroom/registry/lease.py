"""A lock that every host sees: a registered model that exists while its owner works.

MLflow has no compare-and-set, but the name of a registered model is unique, and making one, tags included, is atomic.
A process that died cannot remove its lock, so a lock is also a lease: its owner renews it, and what is not renewed is
taken over. Whoever takes a lock over holds a second one while it does, named after the one that is taken over; so two
processes that both find a lock abandoned do not remove each other's.
"""

import contextlib
import logging
import os
import re
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from darkroom.errors import StageFailed
from darkroom.registry.tracking import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0  # without a renewal, by the clock of the one who waits
POLL_SECONDS = 1.0

_CLOCK_SECONDS = 60.0  # a clock that is set moves the start of every process
_PREFIX = "darkroom.lock."
_TOKEN_BYTES = 8
_TOKEN = re.compile(f"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
_RENEWED = _PREFIX + "renewed_at"

_logger = logging.getLogger(__name__)
_held: set[str] = set()  # tokens of this process


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `machine` tells hosts of one name, and containers on one host, from each other."""

    token: str  # random: one lock, once
    host: str
    machine: str
    pid: int
    started: float  # of the process, in seconds since 1970: pids are used again

    @classmethod
    def me(cls) -> Self:
        """This process, with a new token."""
        started = psutil.Process().create_time()
        return cls(secrets.token_hex(_TOKEN_BYTES), socket.gethostname(), _machine(), os.getpid(), started)

    @classmethod
    def read(cls, tags: dict[str, str]) -> Self:
        """The owner that a lock's tags name; what is missing there is empty."""
        text = {key: tags.get(_PREFIX + key, "") for key in ("token", "host", "machine")}
        try:
            return cls(**text, pid=int(tags[f"{_PREFIX}pid"]), started=float(tags[f"{_PREFIX}started"]))
        except (KeyError, ValueError):
            return cls(**text, pid=0, started=0.0)

    def tags(self) -> dict[str, str]:
        return {_PREFIX + key: str(value) for key, value in vars(self).items()}

    def is_gone(self) -> bool:
        """Whether it is known to work no more: a process of this machine that has ended, or this one, which let go."""
        if self.machine != _machine():
            return False
        if self.pid == os.getpid():
            return self.token not in _held
        try:
            process = psutil.Process(self.pid)
            is_other = abs(process.create_time() - self.started) > _CLOCK_SECONDS
            return bool(is_other or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host or 'an unknown host'}"


class Lease:
    """The right to change a registered model. `Lease.acquire(...)` takes it, `release` gives it back."""

    def __init__(self, client: "MlflowClient", lock: str, owner: Owner) -> None:
        self._client, self._lock, self._owner = client, lock, owner
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="registry-lease", daemon=True)

    @classmethod
    def acquire(cls, client: "MlflowClient", name: str, wait_seconds: float) -> Self:
        """Make `NAME.lock`, waiting for whoever holds it. Raises StageFailed, naming the holder, if that lasts longer.

        What MLflow raises when it cannot be asked passes through.
        """
        lock, owner = f"{name}.lock", Owner.me()
        _held.add(owner.token)
        try:
            _make(client, lock, owner, name, _Patience(name, wait_seconds))
            _sweep(client, lock)
        except BaseException:
            _held.discard(owner.token)  # should the lock have been made, it is known to be abandoned
            raise
        lease = cls(client, lock, owner)
        lease._renewal.start()
        return lease

    def verify(self) -> None:
        """Raise StageFailed if another took it over, or somebody removed it."""
        if not self.is_ours():
            raise StageFailed(
                f"the lock {self._lock!r} was taken away from this command while it worked; nothing was changed by it, "
                "repeat it"
            )

    def is_ours(self) -> bool:
        found = _read(self._client, self._lock)
        return found is not None and Owner.read(found).token == self._owner.token

    def release(self) -> None:
        """Give it back. If the registry cannot be asked, the lock stays, and the next command takes it over."""
        self._ended.set()
        self._renewal.join(timeout=POLL_SECONDS)
        _held.discard(self._owner.token)
        try:
            if self.is_ours():
                _remove(self._client, self._lock)
        except Exception as error:
            _logger.debug("%s was not removed: %s", self._lock, first_line(error))

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                if self.is_ours():
                    self._client.set_registered_model_tag(self._lock, _RENEWED, _now())
            except Exception as error:
                _logger.debug("%s was not renewed: %s", self._lock, first_line(error))


class _Patience:
    """How long one command still waits, having said for whom."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds, self._until = name, seconds, time.monotonic() + seconds
        self._said = False

    def wait(self, owner: Owner) -> None:
        if time.monotonic() >= self._until:
            raise StageFailed(
                f"model {self._name!r} is being changed by {owner}; waited {self._seconds:g} s for it "
                "(DARKROOM_REGISTRY_WAIT); repeat this when it is done"
            )
        if not self._said:
            _logger.info("waiting for %s, which is changing model %r", owner, self._name)
            self._said = True
        time.sleep(POLL_SECONDS)


def _make(client: "MlflowClient", lock: str, owner: Owner, name: str, patience: _Patience) -> None:
    """Create the lock as soon as there is none, taking over what is abandoned."""
    seen: dict[str, str] = {}
    since, nameless = time.monotonic(), 0
    while not _create(client, lock, owner, name):
        found = _read(client, lock)
        if found is None:
            continue
        other = Owner.read(found)
        if other.token == owner.token:  # made by a request whose answer was lost
            return
        nameless = 0 if other.token else nameless + 1
        if nameless == 1:  # one that was removed while MLflow read it has no tags either
            time.sleep(POLL_SECONDS)
            continue
        if nameless:
            raise StageFailed(
                f"the registered model {lock!r} is in the way: the lock of {name!r} has that name, rename the other"
            )
        if found != seen:
            seen, since = found, time.monotonic()
        silent, gone = time.monotonic() - since, other.is_gone()
        if gone or silent >= STALE_SECONDS:
            why = "has ended" if gone else f"has not been heard of for {silent:.0f} s"
            _logger.info("taking over the lock of model %r from %s, which %s", name, other, why)
            _take_away(client, lock, found, owner, name, patience)
        else:
            patience.wait(other)


def _take_away(
    client: "MlflowClient", lock: str, abandoned: dict[str, str], owner: Owner, name: str, patience: _Patience
) -> None:
    """Remove the lock that has these tags, unless it has been renewed or has become somebody else's in the meantime."""
    claim = f"{lock}.{Owner.read(abandoned).token}"
    _make(client, claim, owner, name, patience)
    try:
        if _read(client, lock) == abandoned:
            _remove(client, lock)
    finally:
        _remove(client, claim)


def _sweep(client: "MlflowClient", lock: str) -> None:
    """Remove what processes left that died while they took a lock over. Who holds the lock needs none of it."""
    from mlflow.exceptions import MlflowException

    for model in client.search_registered_models(f"name LIKE '{lock}.%'"):
        tokens = model.name.removeprefix(f"{lock}.").split(".")
        if model.name.startswith(f"{lock}.") and all(_TOKEN.fullmatch(token) for token in tokens):
            with contextlib.suppress(StageFailed, MlflowException):  # another user's, or its owner is removing it
                _remove(client, model.name)


def _create(client: "MlflowClient", lock: str, owner: Owner, name: str) -> bool:
    from mlflow.exceptions import MlflowException

    description = (
        f"Not a model: it exists while a darkroom command changes the model {name!r}, and keeps others from doing so "
        "at the same time. One that was left behind is taken over by the next command."
    )
    try:
        with _permitted():
            client.create_registered_model(lock, tags=owner.tags() | {_RENEWED: _now()}, description=description)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            return False  # the second: it existed, and was gone when MLflow looked what it is
        raise
    return True


def _read(client: "MlflowClient", lock: str) -> dict[str, str] | None:
    """The tags of a lock, None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(lock).tags)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _remove(client: "MlflowClient", lock: str) -> None:
    with _permitted(otherwise_ignoring="RESOURCE_DOES_NOT_EXIST"):
        client.delete_registered_model(lock)


@contextlib.contextmanager
def _permitted(otherwise_ignoring: str = "") -> Iterator[None]:
    """Say in one line that a user may not do this; pass over one other error."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code == "PERMISSION_DENIED":
            raise StageFailed(
                "this user may not lock the registry, which takes the right to create and delete registered models: "
                + first_line(error)
            ) from None
        if error.error_code != otherwise_ignoring:
            raise


def _machine() -> str:
    """Names a host since it was started, and a container on it; where the system does not say, its network card."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{uuid.getnode():012x}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
