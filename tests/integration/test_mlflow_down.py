"""A tracking server that is down, or hangs, costs a training one warning and seconds; it never fails it."""

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkroom.params import load_params
from darkroom.registry import runs
from darkroom.registry.runs import TrainingLog
from darkroom.registry.tracking import RegistryUnavailable, connect
from darkroom.workspace import Workspace

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Accepts connections (the backlog does) and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("server", ["closed_port", "hanging_server"])
def test_training_goes_on_without_the_server(
    server: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = request.getfixturevalue(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(runs, "_CLOSE_SECONDS", 2.0)
    workspace = Workspace(tmp_path)
    with pytest.raises(RegistryUnavailable, match=uri) as error:  # also warms the import up
        connect(workspace)
    assert len(str(error.value).splitlines()) == 1

    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        log = TrainingLog.open(workspace, "f" * 64, PARAMS, {})
        for step in range(5):
            log.log([{"step": step, "loss": 1.0}])
        logged = time.monotonic() - started
        log.close("FINISHED")
    assert logged < 1, "a training must not wait for its log"
    assert time.monotonic() - started < 6
    warnings = [record for record in caplog.records if record.name == "darkroom.registry.runs"]
    assert len(warnings) == 1
    assert "darkroom register" in warnings[0].getMessage()


def test_a_server_that_is_down_is_an_error_of_one_line_for_commands(
    closed_port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port)
    started = time.monotonic()
    with pytest.raises(RegistryUnavailable, match="does not answer"):
        connect(Workspace(tmp_path))
    assert time.monotonic() - started < 20


def test_a_database_server_that_is_down_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://user:secret@127.0.0.1:{port}/runs")
    with pytest.raises(RegistryUnavailable, match="does not answer") as error:
        connect(Workspace(tmp_path))
    assert "secret" not in str(error.value)
