"""One command of a checkout at a time, and how long the next one waits."""

import fcntl
from pathlib import Path

import pytest

from darkroom.errors import InputError, StageFailed
from darkroom.registry.lock import alone_in_checkout, wait_seconds


def test_another_command_of_this_checkout_is_waited_for_and_named(tmp_path: Path) -> None:
    path = tmp_path / "state" / "registry.lock"
    with (
        alone_in_checkout(path, 0),
        pytest.raises(StageFailed, match=r"process \d+ is changing .* waited 0 s .*DARKROOM_REGISTRY_WAIT"),
        alone_in_checkout(path, 0),
    ):
        pass
    with alone_in_checkout(path, 0):
        pass


def test_a_lock_without_a_name_in_it_is_respected(tmp_path: Path) -> None:
    with (tmp_path / "registry.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(StageFailed, match="another process is changing"),
            alone_in_checkout(tmp_path / "registry.lock", 0),
        ):
            pass


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_REGISTRY_WAIT", text)
    with pytest.raises(InputError, match=f"DARKROOM_REGISTRY_WAIT = '{text}': expected seconds"):
        wait_seconds()


def test_the_wait_is_ten_minutes_or_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DARKROOM_REGISTRY_WAIT", raising=False)
    assert wait_seconds() == 600
    monkeypatch.setenv("DARKROOM_REGISTRY_WAIT", "2.5")
    assert wait_seconds() == 2.5
