"""A run's slot while Prefect's server comes and goes; on a real one in tests/integration/test_reproduce.py."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from darkroom.errors import InputError, StageFailed
from flows import limits

AWAY = httpx.ConnectError("All connection attempts failed")


class Server:
    """Stands for Prefect's `concurrency`: away for the first `absences` requests, and again when slots are released."""

    def __init__(self, absences: int = 0, release: Exception | None = None) -> None:
        self.absences, self.release = absences, release
        self.held = 0

    @contextlib.contextmanager
    def concurrency(self, name: str, **options: Any) -> Iterator[None]:
        if self.absences:
            self.absences -= 1
            raise ConcurrencySlotAcquisitionError(f"Unable to acquire concurrency slots on ['{name}']") from AWAY
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1
            if self.release:
                raise self.release


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setenv("DARKROOM_GPU_LIMIT", "gpu")
    slept: list[float] = []
    monkeypatch.setattr(limits.time, "sleep", slept.append)
    return slept


def serve(monkeypatch: pytest.MonkeyPatch, server: Server) -> Server:
    monkeypatch.setattr(limits, "concurrency", server.concurrency)
    return server


def test_a_server_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    server = serve(monkeypatch, Server(absences=3))
    with limits.gpu_slot():
        assert server.held == 1
    assert (server.held, pauses) == (0, [2, 4, 8])


def test_a_server_that_stays_away_is_one_line(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    serve(monkeypatch, Server(absences=100))
    with pytest.raises(StageFailed, match="no slot of 'gpu': Prefect's server does not answer"), limits.gpu_slot():
        pytest.fail("there is no slot")
    assert pauses == list(limits.PATIENCE)


def test_what_was_computed_stays_whatever_becomes_of_the_slot(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    serve(monkeypatch, Server(release=AWAY))
    monkeypatch.setattr(limits, "get_logger", logging.getLogger)  # Prefect's own does not propagate
    with limits.gpu_slot():
        pass
    assert "was not given back, it lapses in 60 s: All connection attempts failed" in caplog.text
    with pytest.raises(StageFailed, match="out of memory"), limits.gpu_slot():
        raise StageFailed("out of memory")


def test_a_limit_that_is_missing_is_bad_input(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    def missing(name: str, **options: Any) -> contextlib.AbstractContextManager[None]:
        raise ConcurrencySlotAcquisitionError(f"Concurrency limits ['{name}'] must be created before acquiring slots")

    monkeypatch.setattr(limits, "concurrency", missing)
    with pytest.raises(InputError, match="prefect gcl create gpu"), limits.gpu_slot():
        pytest.fail("there is no slot")
    assert pauses == []
