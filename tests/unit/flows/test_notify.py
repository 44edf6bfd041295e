"""The webhook: what it is told, that it is asked again within bounds, and that its URL stays secret."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Cancelled, Crashed, Failed

from darkroom.errors import InputError
from flows import notify
from flows.notify import check_url, ended_badly, notice, send

RUN = {"name": "retrain-2026", "id": "1", "url": "http://prefect/runs/1"}


@pytest.fixture
def receiver() -> Iterator[SimpleNamespace]:
    """A server: `told` is what it got, `answer(number)` the status of its number-th answer."""
    state = SimpleNamespace(told=[], answer=lambda number: 200)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            state.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(state.answer(len(state.told)))
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/services/T0KEN"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(notify, "_PAUSE", 0.01)
    return []


def test_a_promotion_reads_well_and_has_its_figures(receiver: SimpleNamespace, warnings: list[str]) -> None:
    content = notice(
        "promoted", run=RUN, model="digits", version="3", previous="2", figures={"unguided.fid": 0.3125, "raw.fid": 1.0}
    )
    assert send(receiver.url, content, warnings.append)
    (told,) = receiver.told
    assert told == content
    assert told["text"].splitlines() == [
        "Darkroom: retrain-2026 promoted version 3 of digits; version 2 served before",
        "FID 0.312",
        "http://prefect/runs/1",
    ]
    assert (told["event"], told["figures"]["raw.fid"], warnings) == ("promoted", 1.0, [])


def test_a_refusal_says_why_and_what_serves() -> None:
    reasons = ["unguided.fid is 1.2: expected at most 0.8 (max_fid)", "data was not validated"]
    first = notice("refused", run=RUN, reasons=reasons, model="digits", version="1")
    assert first["text"].splitlines()[:3] == [
        "Darkroom: retrain-2026 refused version 1 of digits; nothing serves",
        f"- {reasons[0]}",
        f"- {reasons[1]}",
    ]
    later = notice("refused", run=RUN, reasons=reasons, model="digits", version="3", previous="2")
    assert "version 2 stays" in later["text"]


def test_a_server_out_of_order_is_asked_again(receiver: SimpleNamespace, warnings: list[str]) -> None:
    receiver.answer = lambda number: 503 if number < 3 else 200
    assert send(receiver.url, notice("failed", run=RUN), warnings.append)
    assert (len(receiver.told), warnings) == (3, [])


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (500, 3), (429, 3)])
def test_what_does_not_arrive_is_a_warning_without_the_secret(
    receiver: SimpleNamespace, warnings: list[str], status: int, tries: int
) -> None:
    receiver.answer = lambda number: status
    assert not send(receiver.url, notice("failed", run=RUN), warnings.append)
    assert len(receiver.told) == tries
    assert warnings == [f"The webhook at http://127.0.0.1/… was not told of failed: it answered {status}"]


def test_nobody_there_is_a_warning(warnings: list[str]) -> None:
    assert not send("http://127.0.0.1:9/T0KEN", notice("failed", run=RUN), warnings.append)
    assert warnings == ["The webhook at http://127.0.0.1/… was not told of failed: ConnectionRefusedError"]


def test_a_server_that_never_answers_does_not_hold_the_run_up(
    receiver: SimpleNamespace, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_LIMIT", 0.3)
    receiver.answer = lambda number: time.sleep(3) or 200
    began = time.monotonic()
    assert not send(receiver.url, notice("failed", run=RUN), warnings.append)
    assert time.monotonic() - began < 2
    assert "no answer within" in warnings[0]


def test_without_a_url_nothing_happens(warnings: list[str]) -> None:
    assert not send(None, notice("failed", run=RUN), warnings.append)
    assert warnings == []


@pytest.mark.parametrize(
    "url", ["hooks.example.org/T0KEN", "ftp://x/T0KEN", "https://", "https://x:port/T0KEN", "http://x/T0 KEN"]
)
def test_what_is_no_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InputError, match="DARKROOM_WEBHOOK") as caught:
        check_url(url)
    assert "T0" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "events"),
    [
        (Failed(message="a stage failed"), ["failed"]),
        (Failed(name="BadInput", message="one\ntwo"), ["bad_input"]),
        (Failed(name="Interrupted", message="saved"), ["interrupted"]),
        (Failed(name="Unavailable", message="MLflow"), ["failed"]),
        (Failed(name="Refused", message="told already"), []),
        (Crashed(message="gone"), ["crashed"]),
        (Cancelled(), ["cancelled"]),
    ],
)
def test_the_hook_names_how_a_run_ended(
    receiver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, state: Any, events: list[str]
) -> None:
    monkeypatch.setenv("DARKROOM_WEBHOOK", receiver.url)
    monkeypatch.setattr(notify, "describe_run", lambda flow_run: RUN)
    hook: Callable[..., None] = ended_badly
    hook(None, SimpleNamespace(), state)
    assert [told["event"] for told in receiver.told] == events
    assert [told["reasons"] for told in receiver.told] == [(state.message or "").splitlines() for _ in events]
