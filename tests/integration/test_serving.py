"""`mlflow models serve` of the champion, over HTTP."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from PIL import Image

from darkroom.registry.promotion import register
from darkroom.registry.tracking import tracking_uri
from darkroom.workspace import Workspace
from tests.integration.registry_project import empty_database, make_unlabelled, workspace, write_model, write_score

__all__ = ["empty_database", "workspace"]  # fixtures


@contextmanager
def service(workspace: Workspace, tmp_path: Path) -> Iterator[str]:
    """The address of a server that has answered /ping."""
    register(workspace)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    environment |= {"MLFLOW_TRACKING_URI": tracking_uri(workspace), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [str(scripts / "mlflow"), "models", "serve", "-m", "models:/digits@challenger"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def post(address: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_service_draws_pngs_and_refuses_by_name(workspace: Workspace, tmp_path: Path) -> None:
    with service(workspace, tmp_path) as address:
        _check_labelled(address)


def _check_labelled(service: str) -> None:
    split = {"columns": ["class_label"], "data": [[3], [1], [4]]}
    status, answer = post(service, {"dataframe_split": split, "params": {"seed": 7, "guidance_scale": 1.5}})
    assert status == 200
    images = [Image.open(io.BytesIO(base64.b64decode(row["png"], validate=True))) for row in answer["predictions"]]
    assert [(image.format, image.size) for image in images] == [("PNG", (8, 8))] * 3
    params = {"seed": 7, "guidance_scale": 1.5}
    assert post(service, {"dataframe_split": split, "params": params})[1] == answer
    assert post(service, {"inputs": {"class_label": [3, 1, 4]}, "params": params})[1] == answer

    seeded = {"columns": ["class_label", "seed"], "data": [[3, 7], [1, 2**63 - 1], [3, 7]]}
    status, answer = post(service, {"dataframe_split": seeded})
    assert status == 200
    first, second, third = (row["png"] for row in answer["predictions"])
    assert first == third != second
    records = [{"class_label": 1, "seed": 2**63 - 1}]
    assert post(service, {"dataframe_records": records})[1]["predictions"] == [{"png": second}]
    status, answer = post(service, {"dataframe_split": seeded, "params": {"seed": 7}})
    assert status == 400
    assert "seed is a column and a parameter: expected one of them" in answer["message"]

    status, answer = post(service, {"dataframe_split": {"columns": ["class_label"], "data": [[3], [12]]}})
    assert status == 400
    assert "class_label = 12 in row 1: expected 0 to 9" in answer["message"]
    status, answer = post(service, {"dataframe_split": split, "params": {"guidance": 2}})
    assert status == 400
    assert "unknown parameter 'guidance': expected guidance_scale, sampler, steps, seed" in answer["message"]
    for body in (
        {"dataframe_split": split, "params": {"steps": "many"}},
        {"dataframe_split": split, "params": {"steps": 5000}},
        {"dataframe_split": {"columns": ["class_label"], "data": [[None]]}},
        {"dataframe_split": {"columns": ["label"], "data": [[1]]}},
        {"dataframe_split": {"columns": ["class_label"], "data": [[0]] * 257}},
        {"dataframe_split": {"columns": ["class_label"], "data": [[0]] * 200}, "params": {"steps": 200}},
        {"dataframe_split": {"columns": ["class_label", "seed"], "data": [[0, 1], [0, None]]}},
        {"dataframe_split": {"columns": ["class_label", "seed"], "data": [[0, -1]]}},
        {},
    ):
        status, answer = post(service, body)
        assert status == 400, answer


def test_a_service_without_classes_draws_an_image_for_each_row(workspace: Workspace) -> None:
    """MLflow's application itself, in this process: what a server of its own adds is tested above."""
    make_unlabelled(workspace.root)
    write_model(workspace, 1)
    write_score(workspace, accuracy=None, guided_accuracy=None, guidance_scale=1.0)
    register(workspace)
    (package,) = (workspace.state / "artifacts" / "models").glob("*/artifacts")

    def post(client: TestClient, body: dict[str, Any]) -> tuple[int, Any]:
        answer = client.post("/invocations", json=body)
        return answer.status_code, answer.json()

    with TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(package)))) as address:
        for body in (
            {"dataframe_split": {"columns": [], "data": [[], []]}, "params": {"seed": 1}},
            {"dataframe_records": [{}, {}], "params": {"seed": 1}},
        ):
            status, answer = post(address, body)
            assert status == 200
            assert len({row["png"] for row in answer["predictions"]}) == 2
        status, answer = post(address, {"dataframe_split": {"columns": ["seed"], "data": [[5], [5], [6]]}})
        assert status == 200
        first, second, third = (row["png"] for row in answer["predictions"])
        assert first == second != third
        for body in (
            {"dataframe_split": {"columns": ["class_label"], "data": [[3]]}},
            {"dataframe_split": {"columns": ["seed"], "data": [[3], [None]]}},
            {"inputs": {"class_label": [3]}},
            {"instances": [[], []]},
        ):
            status, answer = post(address, body)
            assert status == 400, answer


def split(*rows: Any, columns: tuple[str, ...] = ("class_label",), **more: Any) -> dict[str, Any]:
    return {"dataframe_split": {"columns": list(columns), "data": [[row] for row in rows]}, **more}


LABELS, SEEDS = "expected 0 to 9 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)", "expected 0 to 2**63 - 1"
NO_LABELS = [
    *(
        (value, f"class_label = {value!r} in row 0: {LABELS}")
        for value in (3.5, 3.0, "3", True, -1, 10, 2**63, -(2**63))
    ),
    *((value, f"class_label = {value!r} in row 0: {LABELS}") for value in ([1], {"a": 1}, "", float("inf"))),
    *((value, f"class_label is missing in row 0: {LABELS}") for value in (None, float("nan"))),
    (10**30, f"class_label = {10**30} in row 0: {LABELS}"),
    ("x" * 100_000, "class_label = 'xxx"),
]
MALFORMED: list[tuple[Any, str]] = [  # a body and what the answer says
    *((split(value), words) for value, words in NO_LABELS),
    *((split(0, value), words.replace("row 0", "row 1")) for value, words in NO_LABELS if not isinstance(value, float)),
    *((split(0, params={"seed": value}), f"seed = {value}: {SEEDS}") for value in (-1, 2**63, 10**30)),
    *((split(0, params={"seed": value}), "seed") for value in (3.5, "3", True, [1], {}, float("nan"), None)),
    *((split(0, params={"steps": value}), "steps") for value in (0, 3.5, "3", True, [1], None, 2**63, 10**30)),
    *((split(0, params={"guidance_scale": value}), "guidance_scale") for value in ("2", True, None, [1], 1e300)),
    *((split(0, params={"sampler": value}), "sampler") for value in (3, None, ["ddim"], "x" * 1000)),
    *((split(0, params=value), "Parameters must be a dictionary") for value in (3, "x", [1])),
    *(({"dataframe_records": [{"class_label": 1, "seed": value}]}, "seed") for value in (3.5, "3", True, 2**63, [1])),
    *(({"inputs": {"class_label": [value]}}, "class_label") for value in (3.5, "3", True, None, 2**63, [1])),
    *(({"instances": [{"class_label": value}]}, "class_label") for value in (3.5, "3", True, 2**63, [1])),
    ({"dataframe_records": [{"class_label": 3}, {"seed": 1}]}, "class_label"),
    ({"dataframe_records": {}}, "must be a list of records"),
    ({"dataframe_records": 3}, "must be a list of records"),
    ({"dataframe_split": 3}, "must be a dictionary"),
    ({"dataframe_split": {}}, "must have 'data' field"),
    ({"dataframe_split": {"columns": ["class_label"]}}, "must have 'data' field"),
    ({"dataframe_split": {"columns": [], "data": []}}, "class_label"),
    ({"dataframe_split": {"data": [[3]]}}, "class_label"),
    ({"dataframe_split": {"columns": ["class_label"], "data": [[1, 2], [3]]}}, "1 columns passed"),
    ({"dataframe_split": {"columns": ["class_label", "class_label"], "data": [[1, 2]]}}, "class_label"),
    ({"dataframe_split": {"columns": [["class_label"]], "data": [[1]]}}, "class_label"),
    ({"inputs": 3}, "class_label"),
    ({"inputs": [3, 4]}, "class_label"),
    ({"instances": [3, 4]}, "class_label"),
    ({"instances": [[[3]]]}, "class_label"),
    ({"messages": []}, "class_label"),
    ({"dataframe_split": {}, "inputs": {}}, "exactly one of the input fields"),
    ({}, "exactly one of the input fields"),
    ([], "Received a list"),
    (3, "unexpected input type"),
    (None, "unexpected input type"),
    (b"not json", "valid JSON"),
    (b"", "valid JSON"),
    (b'"\xff"', "valid JSON"),
]


@pytest.fixture
def client(workspace: Workspace) -> Iterator[TestClient]:
    """MLflow's application itself around the registered model, in this process."""
    register(workspace)
    (package,) = (workspace.state / "artifacts" / "models").glob("*/artifacts")
    application = scoring_server.init(mlflow.pyfunc.load_model(str(package)))
    with TestClient(application, raise_server_exceptions=False) as client:
        yield client


def test_every_malformed_body_is_refused_by_name(client: TestClient) -> None:
    wrong = []
    for body, words in MALFORMED:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.post("/invocations", content=content, headers={"Content-Type": "application/json"})
        message = answer.json()["message"] if answer.status_code == 400 else ""
        if answer.status_code != 400 or words not in message or "Traceback" in answer.text or len(message) > 2000:
            wrong.append((content[:100], answer.status_code, answer.text[:300]))
    assert wrong == [], "\n".join(map(str, wrong))
    assert client.post("/invocations", json=split(3, 9)).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/json; charset=latin-1", "application/octet-stream"]
)
def test_another_content_type_is_refused(client: TestClient, content_type: str) -> None:
    assert client.post("/invocations", content=b"{}", headers={"Content-Type": content_type}).status_code == 415
