"""Who is refused by the stack's servers: requests as browsers send them for a page, beside those of programs."""

import asyncio
from typing import Any

import pytest

from flows.stack.guard import Guard, refusal
from flows.stack.s3 import HEALTH, guard

HOST = "127.0.0.1:4200"
KEY = "AWS4-HMAC-SHA256 Credential={}/20260101/us-east-1/{}/aws4_request, SignedHeaders=host, Signature=0"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": HOST},
        {"host": "localhost:14200"},  # through a tunnel
        {"host": "[::1]:4200"},
        {"host": "incoming.localhost:9000"},
        {"host": HOST, "origin": f"http://{HOST}", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        {"host": HOST, "sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
        {"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    ],
)
def test_programs_and_own_pages_are_answered_and_links_may_be_followed(headers: dict[str, str]) -> None:
    assert refusal("GET", headers) is None


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "not a name of this server"),
        ({"host": ""}, "not a name of this server"),
        ({"host": "rebound.example:4200"}, "not a name of this server"),
        ({"host": "10.rebound.example"}, "not a name of this server"),
        ({"host": "127.0.0.1.example:4200"}, "not a name of this server"),
        ({"host": "127.0.0.1@rebound.example"}, "not a name of this server"),
        ({"host": "notlocalhost"}, "not a name of this server"),
        ({"host": "[::1"}, "malformed Host or Origin"),
        ({"host": HOST, "origin": "https://page.example"}, "a page of another origin"),
        ({"host": HOST, "origin": "http://localhost:8888"}, "a page of another origin"),
        ({"host": HOST, "origin": "http://127.0.0.1:8888"}, "a page of another origin"),
        ({"host": HOST, "origin": "null"}, "a page of another origin"),
        ({"host": HOST, "origin": ""}, "a page of another origin"),
        ({"host": HOST, "origin": "http://[::1"}, "malformed Host or Origin"),
        ({"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, "a page of another site"),
        ({"host": HOST, "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, "a page of another site"),
        (
            {"host": HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
            "a page of another site",
        ),
    ],
)
def test_pages_of_others_are_refused(headers: dict[str, str], reason: str) -> None:
    assert refusal("GET", headers) == reason


def test_a_form_of_another_page_is_refused_though_it_navigates() -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert refusal("POST", {"host": HOST, **headers}) == "a page of another site"


def test_more_names_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_STACK_HOSTS", "prefect,stack.example.org")
    assert refusal("GET", {"host": "stack.example.org"}) is None
    assert refusal("GET", {"host": "prefect:4200"}) is None
    assert refusal("GET", {"host": "example.org"}) is not None


@pytest.mark.parametrize(("host", "reached"), [(HOST, True), ("rebound.example", False)])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_what_is_refused_does_not_reach_the_application(kind: str, host: str, reached: bool) -> None:
    called, sent = [], []

    async def application(*_: Any) -> None:
        called.append(True)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": "GET", "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(application)(scope, receive, send))
    assert bool(called) == reached
    if not reached:
        assert sent[0].get("status") == 403 if kind == "http" else sent[0]["type"] == "websocket.close"


@pytest.mark.parametrize(
    ("path", "extra", "status"),
    [
        (HEALTH, {}, "200"),
        (HEALTH, {"HTTP_HOST": "rebound.example"}, "403"),
        ("/incoming", {}, "403"),
        ("/incoming", {"HTTP_AUTHORIZATION": KEY.format("ours", "s3")}, "299"),
        ("/incoming", {"QUERY_STRING": "X-Amz-Credential=ours%2F20260101%2Fus-east-1%2Fs3%2Faws4_request"}, "299"),
        ("/incoming", {"HTTP_AUTHORIZATION": KEY.format("theirs", "s3")}, "403"),
        ("/incoming", {"HTTP_AUTHORIZATION": KEY.format("ours", "iam")}, "403"),
        ("/incoming", {"HTTP_AUTHORIZATION": "Basic b3VyczpvdXJz"}, "403"),
        ("/incoming", {"HTTP_AUTHORIZATION": KEY.format("ours", "s3"), "HTTP_ORIGIN": "http://page.example"}, "403"),
        ("/moto-api/reset", {"HTTP_AUTHORIZATION": KEY.format("ours", "s3")}, "403"),
        ("/latest/meta-data/iam", {"HTTP_AUTHORIZATION": KEY.format("ours", "s3")}, "403"),
    ],
)
def test_the_test_s3_is_for_programs_with_its_key(path: str, extra: dict[str, str], status: str) -> None:
    def application(_: Any, start: Any) -> list[bytes]:
        start("299 Reached", [])
        return []

    given: list[str] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_HOST": "127.0.0.1:9000", **extra}
    guard(application, "ours")(environ, lambda line, _: given.append(line))  # type: ignore[arg-type]
    assert [line[:3] for line in given] == [status]
