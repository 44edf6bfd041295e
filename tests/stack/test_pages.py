"""A page on a foreign origin gets nothing out of the stack, and does nothing to it."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.exceptions import PrefectHTTPStatusError
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.stack.settings import read_env
from tests.stack.pages import CHROMIUM, REBOUND, try_calls
from tests.stack.running import Stack

pytestmark = pytest.mark.timeout(300)
_ALL = 12


@pytest.fixture
def target(stack: Stack) -> dict[str, Any]:
    """What the page is told: more than it could know."""
    with stack.prefect() as client:
        deployment = client.read_deployment_by_name("reproduce/reproduce").id
    client = stack.mlflow()
    experiment = client.create_experiment(f"victim-{uuid4().hex[:6]}")
    stack.s3().put_object(Bucket=stack.bucket, Key="page-victim", Body=b"an image")
    mlflow = f"{stack.mlflow_url}/api/2.0/mlflow"
    there = lambda url: url.replace("127.0.0.1", REBOUND)  # noqa: E731
    return {
        "prefect": stack.prefect_url,
        "run": f"{stack.prefect_url}/deployments/{deployment}/create_flow_run",
        "deployment": str(deployment),
        "command": f"touch {stack.root / 'page-was-here'}",
        "event": {
            "id": str(uuid4()),
            "occurred": "2026-01-01T00:00:00Z",
            "event": "page.event",
            "resource": {"prefect.resource.id": "page"},
        },
        "mlflow": mlflow,
        "experiment": experiment,
        "key": stack.environment["AWS_ACCESS_KEY_ID"],
        "s3": f"http://127.0.0.1:{stack.environment['S3_PORT']}",
        "bucket": stack.bucket,
        "rebound": {
            "prefect": there(f"{stack.prefect_url}/deployments/filter"),
            "mlflow": there(f"{mlflow}/experiments/search?max_results=9"),
        },
    }


def done(stack: Stack, target: dict[str, Any]) -> set[str]:
    """The calls that have left something behind."""
    found = set()
    with stack.prefect() as client:
        one = DeploymentFilter.model_validate({"id": {"any_": [UUID(target["deployment"])]}})
        for name, call in (("page-json", "run a command"), ("page-simple", "run a command by a simple POST")):
            runs = FlowRunFilter.model_validate({"name": {"any_": [name]}})
            if client.read_flow_runs(deployment_filter=one, flow_run_filter=runs):
                found.add(f"Prefect: {call}")
        events = client.request("POST", "/events/filter", json={"filter": {"event": {"name": ["page.event"]}}}).json()
        if target["event"]["id"] in json.dumps(events):
            found.add("Prefect: send an event")
    experiments = {one.name: one for one in stack.mlflow().search_experiments()}
    if "page" in experiments:
        found.add("MLflow: create an experiment by a simple POST")
    if target["experiment"] not in {one.experiment_id for one in experiments.values()}:
        found.add("MLflow: delete an experiment")
    buckets = {bucket["Name"] for bucket in stack.s3().list_buckets()["Buckets"]}
    keys = (
        {entry["Key"] for entry in stack.s3().list_objects_v2(Bucket=stack.bucket).get("Contents", [])}
        if stack.bucket in buckets
        else set()
    )
    if "page" in keys:
        found.add("S3: put an object")
    if "page-victim" not in keys:
        found.add("S3: reset by a simple POST")
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: neither chromium nor google-chrome is on PATH")
@pytest.mark.parametrize("origin", ["page.test", "localhost"])
def test_none_of_a_foreign_pages_calls_succeeds_in_a_real_browser(
    stack: Stack, target: dict[str, Any], origin: str, report: Callable[[str, list[str]], None]
) -> None:
    """`localhost` on another port is a foreign origin too: whatever else runs on this machine."""
    read = try_calls(target, origin)
    assert len(read) == _ALL
    succeeded = {name for name, could in read.items() if could} | done(stack, target)
    lines = [f"{'succeeds' if name in succeeded else 'refused':<9} {name}" for name in read]
    report(f"a page on {origin}: {len(succeeded)} of {len(read)} calls", lines)
    assert succeeded == set()


def requests(target: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, str], str]]:
    """What a browser would send for a page: method, URL, headers, body."""
    prefect, mlflow, s3 = target["prefect"], target["mlflow"], target["s3"]
    server, run = prefect.removesuffix("/api"), target["run"]
    json_type, text_type = {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}
    command = json.dumps({"name": "page-json", "job_variables": {"command": target["command"]}})
    bucket = f"{s3}/{target['bucket']}"
    credential = f"X-Amz-Credential={target['key']}%2F20260101%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature=0"
    form = '--b\r\nContent-Disposition: form-data; name="key"\r\n\r\npage\r\n--b--\r\n'
    calls: list[tuple[str, str, dict[str, str], str]] = [
        ("POST", f"{prefect}/deployments/filter", json_type, "{}"),
        (
            "OPTIONS",
            run,
            {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"},
            "",
        ),
        ("POST", run, json_type, command),
        ("POST", run, text_type, command),
        ("POST", run, {}, command),
        ("GET", f"{prefect}/csrf-token?client=page", {}, ""),
        ("GET", f"{prefect}/admin/settings", {}, ""),
        ("PATCH", f"{prefect}/work_pools/process", json_type, '{"is_paused": true}'),
        ("DELETE", f"{prefect}/deployments/{target['deployment']}", {}, ""),
        ("GET", f"{server}/ui-settings", {}, ""),
        ("GET", f"{mlflow}/experiments/search?max_results=9", {}, ""),
        ("POST", f"{mlflow}/experiments/search", json_type, '{"max_results": 9}'),
        ("POST", f"{mlflow}/experiments/create", json_type, '{"name": "page"}'),
        ("POST", f"{mlflow}/experiments/create", text_type, '{"name": "page"}'),
        ("POST", f"{mlflow}/experiments/create", {"Content-Type": "text/plain;application/json"}, '{"name": "page"}'),
        ("POST", f"{mlflow}/experiments/delete", json_type, json.dumps({"experiment_id": target["experiment"]})),
        ("PUT", f"{mlflow}-artifacts/artifacts/page", {}, "page"),
        ("GET", bucket, {}, ""),
        ("GET", f"{bucket}?{credential}", {}, ""),
        ("PUT", f"{bucket}/page", {}, "page"),
        ("POST", bucket, {"Content-Type": "multipart/form-data; boundary=b"}, form),
        ("POST", f"{bucket}?{credential}", {"Content-Type": "multipart/form-data; boundary=b"}, form),
        ("DELETE", f"{bucket}/page-victim", {}, ""),
        ("GET", f"{s3}/moto-api/data.json", {}, ""),
        ("POST", f"{s3}/moto-api/config", text_type, '{"batch": {}}'),
        ("GET", f"{s3}/moto-api/reset", {}, ""),
        ("POST", f"{s3}/moto-api/reset", {}, ""),
    ]
    for method, url, headers, body in calls:
        for origin in ("https://page.example", "http://localhost:8888", "null"):
            site = "same-site" if "localhost" in origin else "cross-site"
            yield method, url, {"Origin": origin, "Sec-Fetch-Site": site, **headers}, body
        if method in ("GET", "POST") and headers in ({}, text_type):  # an image, a form of an old browser
            yield method, url, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", **headers}, body
        for name in ("rebound.example", "10.rebound.example"):
            host = url.split("/")[2].replace("127.0.0.1", name)
            yield (
                method,
                url,
                {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin", **headers},
                body,
            )
            yield method, url, {"Host": host, **headers}, body


def test_nothing_that_a_browser_sends_for_a_foreign_page_is_done_or_can_be_read(
    stack: Stack, target: dict[str, Any]
) -> None:
    answered, count = [], 0
    with httpx.Client() as client:
        for method, url, headers, body in requests(target):
            answer = client.request(method, url, headers=headers, content=body or None)
            allowed = answer.headers.get("Access-Control-Allow-Origin", "")
            rebound = "Host" in headers
            count += 1
            if answer.status_code < 400 and (rebound or allowed in ("*", headers.get("Origin"))):
                answered.append((method, url, headers, answer.status_code))
    assert count >= 100
    assert answered == []
    assert done(stack, target) == set()
    with stack.prefect() as client:
        assert not client.read_work_pool("process").is_paused
        assert client.read_deployment(UUID(target["deployment"]))


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
@pytest.mark.parametrize(
    ("origin", "host", "token"),
    [
        (None, None, None),  # a program without the password
        (None, None, "wrong"),
        ("https://page.example", None, None),
        ("http://localhost:8888", None, None),
        (None, "rebound.example", None),
    ],
)
def test_a_socket_without_the_password_is_closed(
    stack: Stack, target: dict[str, Any], path: str, origin: str | None, host: str | None, token: str | None
) -> None:
    address = stack.prefect_url.replace("http://127.0.0.1", f"ws://{host or '127.0.0.1'}")
    with pytest.raises((InvalidStatus, ConnectionClosed)):
        send(f"{address}/{path}", origin, token, target["event"])
    assert "Prefect: send an event" not in done(stack, target)


def send(url: str, origin: str | None, token: str | None, event: dict[str, Any]) -> None:
    """Sign in and send an event; raises what the server closes the connection with."""
    to_here = socket.create_connection(("127.0.0.1", urlsplit(url).port or 80), timeout=10)
    with connect(url, origin=origin, subprotocols=["prefect"], sock=to_here) as opened:  # type: ignore[arg-type,list-item]
        opened.send(json.dumps({"type": "auth", "token": token}))
        opened.send(json.dumps(event))
        opened.recv(10)
        opened.recv(10)


@pytest.mark.parametrize(
    "variables", [{"command": "touch x"}, {"env": {"A": "1"}}, {"env.A": "1"}, {"working_dir": "/"}]
)
def test_who_may_start_a_run_does_not_choose_what_it_executes(
    stack: Stack, target: dict[str, Any], variables: dict[str, Any]
) -> None:
    with stack.prefect() as client, pytest.raises(PrefectHTTPStatusError, match="Error creating flow run"):
        client.create_flow_run_from_deployment(UUID(target["deployment"]), job_variables=variables)


def test_the_servers_pages_know_their_own_server_and_ask_for_the_password(stack: Stack) -> None:
    server = stack.prefect_url.removesuffix("/api")
    told = httpx.get(f"{server}/ui-settings").json()
    assert told["api_url"] == "/api"
    assert told["auth"] == "BASIC"
    assert told["csrf_enabled"]
    assert httpx.get(f"{server}/api/health").status_code == 200
    assert httpx.post(f"{server}/api/deployments/filter", json={}).status_code in (401, 403)


def test_what_the_stack_keeps_is_closed_to_other_users(stack: Stack) -> None:
    open_to_all = [path for path in (stack.directory, *stack.directory.rglob("*")) if path.stat().st_mode & 0o007]
    assert open_to_all == []


def test_no_password_is_in_a_log_an_argument_or_what_the_stack_says(stack: Stack) -> None:
    passwords = list(read_env(stack.directory / "passwords.env").values())
    assert len(passwords) == 3
    logs = [path.read_text(errors="replace") for path in (stack.directory / "logs").iterdir()]
    arguments = [" ".join(process.cmdline()) for process in stack.processes()]
    for text in (stack.output, (stack.directory / "running.json").read_text(), *logs, *arguments):
        assert not [password for password in passwords if password in text]
