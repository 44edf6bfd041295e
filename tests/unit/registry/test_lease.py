"""A lock that every host sees: who gets it, who waits, and whose is taken over. Time passes as the tests say."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST

from darkroom.errors import StageFailed
from darkroom.registry import lease
from darkroom.registry.lease import RENEW_SECONDS, STALE_SECONDS, Lease, Owner

LOCK = "digits.lock"


class Registry:
    """What of MLflow's client a lock needs, in memory."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, str]] = {}

    def create_registered_model(self, name: str, tags: dict[str, str], description: str) -> None:
        assert "not a model" in description.lower()
        if name in self.models:
            raise MlflowException(f"{name} exists", error_code=RESOURCE_ALREADY_EXISTS)
        self.models[name] = dict(tags)

    def get_registered_model(self, name: str) -> Any:
        self._there(name)
        return SimpleNamespace(name=name, tags=dict(self.models[name]))

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._there(name)
        self.models[name][key] = value

    def delete_registered_model(self, name: str) -> None:
        self._there(name)
        del self.models[name]

    def search_registered_models(self, query: str) -> list[Any]:
        assert query == f"name LIKE '{LOCK}.%'"
        return [SimpleNamespace(name=name) for name in self.models if name.startswith(f"{LOCK}.")]

    def _there(self, name: str) -> None:
        if name not in self.models:
            raise MlflowException(f"{name} not found", error_code=RESOURCE_DOES_NOT_EXIST)


class Clock:
    """Passes when somebody sleeps; `then` happens at each tick."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: Callable[[float], None] = lambda now: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


@pytest.fixture
def registry() -> Any:
    return Registry()


def elsewhere(**changes: Any) -> Owner:
    return dataclasses.replace(Owner.me(), host="other", machine="another boot", **changes)


def occupy(registry: Registry, owner: Owner, renewed: str = "long ago") -> None:
    registry.models[LOCK] = owner.tags() | {"darkroom.lock.renewed_at": renewed}


def test_it_is_there_while_it_is_held_and_gone_afterwards(registry: Any) -> None:
    held = Lease.acquire(registry, "digits", 0)
    assert Owner.read(registry.models[LOCK]).pid == os.getpid()
    held.verify()
    held.release()
    assert registry.models == {}
    held.release()  # again


def test_a_holder_on_another_host_is_waited_for_and_said_once(
    registry: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    owner = elsewhere(pid=12)
    occupy(registry, owner)

    def ends(now: float) -> None:
        if now >= 50:
            registry.models.pop(LOCK, None)

    clock.then = ends
    with caplog.at_level("INFO"):
        held = Lease.acquire(registry, "digits", 600)
    assert clock.now == 50
    assert caplog.messages == ["waiting for process 12 on other, which is changing model 'digits'"]
    held.release()


def test_waiting_ends_with_the_name_of_the_holder(registry: Any, clock: Clock) -> None:
    occupy(registry, elsewhere(pid=12))
    with pytest.raises(StageFailed, match=r"changed by process 12 on other; waited 30 s .*DARKROOM_REGISTRY_WAIT"):
        Lease.acquire(registry, "digits", 30)
    assert Owner.read(registry.models[LOCK]).pid == 12


def test_one_that_is_not_renewed_is_taken_over_whatever_the_clocks_say(
    registry: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    occupy(registry, elsewhere(pid=12), renewed="2999-01-01T00:00:00+00:00")
    with caplog.at_level("INFO"):
        held = Lease.acquire(registry, "digits", 600)
    assert clock.now == STALE_SECONDS
    assert "taking over" in caplog.messages[-1]
    assert "process 12 on other" in caplog.messages[-1]
    held.verify()
    held.release()
    assert registry.models == {}, "nor is what the taking over needed"


def test_one_that_is_renewed_is_not_taken_over(registry: Any, clock: Clock) -> None:
    occupy(registry, elsewhere(pid=12))

    def renews(now: float) -> None:
        if now % RENEW_SECONDS == 0:
            registry.models[LOCK]["darkroom.lock.renewed_at"] = str(now)

    clock.then = renews
    with pytest.raises(StageFailed, match="process 12 on other"):
        Lease.acquire(registry, "digits", 10 * STALE_SECONDS)


def test_one_of_a_process_that_ended_here_is_taken_over_at_once(registry: Any, clock: Clock) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time()
        owner = dataclasses.replace(Owner.me(), pid=process.pid, started=started)
        assert not owner.is_gone()
        assert dataclasses.replace(owner, started=started - 3600).is_gone(), "another process with its number"
        process.kill()
        process.wait()
    assert owner.is_gone()
    occupy(registry, owner)
    Lease.acquire(registry, "digits", 0).release()
    assert clock.now == 0


def test_what_this_process_left_behind_is_not_waited_for(registry: Any, clock: Clock) -> None:
    occupy(registry, Owner.me())
    Lease.acquire(registry, "digits", 0).release()
    assert clock.now == 0


def test_two_that_want_an_abandoned_one_do_not_remove_each_others(
    registry: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned = elsewhere(pid=12)
    occupy(registry, abandoned)
    rival = elsewhere(pid=13)
    original = registry.create_registered_model

    def create(name: str, tags: dict[str, str], description: str) -> None:
        if name == f"{LOCK}.{abandoned.token}" and Owner.read(registry.models[LOCK]) == abandoned:
            occupy(registry, rival, renewed="just now")  # the rival was faster, between our look and our claim
        original(name, tags, description)

    monkeypatch.setattr(registry, "create_registered_model", create)
    with pytest.raises(StageFailed, match="process 13 on other"):
        Lease.acquire(registry, "digits", STALE_SECONDS + 30)
    assert Owner.read(registry.models[LOCK]) == rival
    assert list(registry.models) == [LOCK]


def test_a_claim_whose_owner_died_is_taken_over_and_swept(registry: Any, clock: Clock) -> None:
    abandoned = dataclasses.replace(Owner.me(), pid=0)
    occupy(registry, abandoned)
    registry.models[f"{LOCK}.{abandoned.token}"] = dataclasses.replace(Owner.me(), pid=0).tags()
    registry.models[f"{LOCK}.{'a' * 16}"] = dataclasses.replace(Owner.me(), pid=0).tags()
    registry.models[f"{LOCK}.lock"] = elsewhere().tags()  # of a model named digits.lock
    Lease.acquire(registry, "digits", 0).release()
    assert list(registry.models) == [f"{LOCK}.lock"]


def test_a_lock_that_somebody_else_took_is_noticed_and_left_alone(registry: Any) -> None:
    held = Lease.acquire(registry, "digits", 0)
    occupy(registry, elsewhere(pid=12))
    with pytest.raises(StageFailed, match="taken away"):
        held.verify()
    held.release()
    assert Owner.read(registry.models[LOCK]).pid == 12


def test_an_answer_that_was_lost_is_no_reason_to_wait_for_oneself(
    registry: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = registry.create_registered_model

    def create(name: str, tags: dict[str, str], description: str) -> None:
        monkeypatch.setattr(registry, "create_registered_model", original)
        original(name, tags, description)
        original(name, tags, description)  # MLflow's client asks again

    monkeypatch.setattr(registry, "create_registered_model", create)
    held = Lease.acquire(registry, "digits", 0)
    held.verify()
    held.release()
    assert registry.models == {}


def test_a_model_of_that_name_is_not_removed(registry: Any, clock: Clock) -> None:
    registry.models[LOCK] = {"owner": "somebody"}
    with pytest.raises(StageFailed, match=r"'digits\.lock' is in the way"):
        Lease.acquire(registry, "digits", 600)
    assert registry.models == {LOCK: {"owner": "somebody"}}


def test_a_user_who_may_not_lock_is_told_so_in_one_line(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise MlflowException("Permission denied\nby the server", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(registry, "create_registered_model", create)
    with pytest.raises(StageFailed, match=r"this user may not lock the registry.*: Permission denied") as error:
        Lease.acquire(registry, "digits", 0)
    assert len(str(error.value).splitlines()) == 1
