"""What is deployed: prefect.yaml against the flows, and the set-up's answers to what is missing."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint

from darkroom.errors import InputError
from flows import deploy
from tests.servers import free_port

ROOT = Path(__file__).parents[3]
CONTENT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, Any] = {entry["name"]: entry for entry in CONTENT["deployments"]}


def test_prefect_reads_the_file() -> None:
    assert len(PrefectYamlModel.model_validate(CONTENT).deployments) == 5
    assert deploy.deployment_names(ROOT / "prefect.yaml") == list(DEPLOYMENTS)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_is_a_flow_and_its_parameters(name: str) -> None:
    entry = DEPLOYMENTS[name]
    flow = load_flow_from_entrypoint(str(ROOT / entry["entrypoint"]))
    assert flow.name == name
    parameters = entry.get("parameters", {})
    assert set(parameters) <= set(inspect.signature(flow.fn).parameters)
    if entry.get("schedules"):
        flow.validate_parameters(parameters)  # nobody is there to give those that are missing
    assert entry["work_pool"] == {"name": "{{ $DARKROOM_POOL }}"}


def test_overlapping_runs_are_cancelled() -> None:
    limited = {name for name, entry in DEPLOYMENTS.items() if entry.get("concurrency_limit")}
    assert limited == {"retrain", "watch", "reproduce", "sweep"}
    assert all(DEPLOYMENTS[n]["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"} for n in limited)


def test_retrain_runs_every_night_in_a_named_timezone() -> None:
    (schedule,) = DEPLOYMENTS["retrain"]["schedules"]
    assert schedule.pop("active")
    assert CronSchedule(**schedule).timezone == "UTC"
    assert schedule["cron"].split()[2:] == ["*", "*", "*"]


def test_the_version_of_deployments_follows_the_flows(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "prefect.yaml").write_text("deployments: []\n")
    (tmp_path / "flows" / "one.py").write_text("a = 1\n")
    before = deploy.deployed_version(tmp_path, "process")
    assert before == deploy.deployed_version(tmp_path, "process")
    assert before != deploy.deployed_version(tmp_path, "docker")
    (tmp_path / "flows" / "one.py").write_text("a = 2\n")
    assert before != deploy.deployed_version(tmp_path, "process")


@pytest.mark.parametrize("text", ["deployments: [", "deployments:\n  - entrypoint: a.py:b\n", "[]\n", ""])
def test_a_file_without_deployments_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(InputError, match=r"prefect.yaml: expected `deployments`") as refused:
        deploy.deployment_names(tmp_path / "prefect.yaml")
    assert "\n" not in str(refused.value)


def test_set_up_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DARKROOM_POOL", "slurm")
    assert deploy.main() == 2
    assert capsys.readouterr().err == "DARKROOM_POOL = 'slurm': expected one of process, docker, kubernetes\n"

    monkeypatch.setenv("DARKROOM_POOL", "process")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert deploy.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("PREFECT_API_URL is not set: expected the address of a Prefect server")


@pytest.mark.parametrize("storage", ["memory", "filesystem", None])
def test_a_server_that_would_forget_its_slots_is_warned_of(storage: str | None) -> None:
    module = f"prefect.server.concurrency.lease_storage.{storage}"
    answer: Any = {"server": {"concurrency": {"lease_storage": module}}} if storage else {"detail": "Not Found"}
    client = MagicMock()
    client._client.get.return_value = httpx.Response(200 if storage else 404, json=answer)
    lines = deploy.look_at_leases(client)
    assert len(lines) == (storage == "memory")
    assert all(line.endswith("=prefect.server.concurrency.lease_storage.filesystem for it") for line in lines)


def test_a_pool_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_POOL", "docker")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs prefect_docker: pip install 'darkroom\[docker\]'"):
        deploy.pool_name()


def test_a_server_that_does_not_answer_is_named_in_one_line() -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    environment = os.environ | {"PREFECT_API_URL": url}  # Prefect reads it once, when it is imported
    command = [sys.executable, "-m", "flows.deploy"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"PREFECT_API_URL = {url}: no Prefect server answers there")
