"""What a run would get from each pool: rendered by the workers' own classes from the templates in this repository."""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration

from flows import deploy
from flows.processes import GRACE
from flows.stack.prefect_worker import declared

POOLS = Path(__file__).parents[3] / "flows" / "pools"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "secret-key-id",
    "AWS_SECRET_ACCESS_KEY": "secret-key",
    "MLFLOW_TRACKING_PASSWORD": "secret-password",
    "DARKROOM_WEBHOOK": "https://example.org/secret-hook",
    "PREFECT_API_AUTH_STRING": "secret-auth-string",
}


@pytest.fixture(autouse=True)
def _worker_has_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def rendered(cls: type[BaseJobConfiguration], pool: str, **variables: Any) -> Any:
    """The job configuration of a run whose deployment sets these variables."""
    template = json.loads((POOLS / f"{pool}.json").read_text())
    client = MagicMock()
    configuration = asyncio.run(
        cls.from_template_and_values(base_job_template=template, values=variables, client=client)
    )
    flow_run = FlowRun(id=uuid.uuid4(), name="clever-cat", flow_id=uuid.uuid4(), parameters={})
    configuration.prepare_for_flow_run(flow_run, flow=Flow(id=flow_run.flow_id, name="retrain", labels={}))
    return configuration


@pytest.mark.parametrize("pool", ["process", "docker", "kubernetes"])
def test_every_variable_is_used_and_every_placeholder_is_one(pool: str) -> None:
    from prefect.utilities.templating import find_placeholders

    template = json.loads((POOLS / f"{pool}.json").read_text())
    placeholders = {placeholder.name for placeholder in find_placeholders(template["job_configuration"])}
    assert placeholders == set(template["variables"]["properties"])


@pytest.mark.parametrize("pool", ["process", "docker", "kubernetes"])
def test_the_defaults_obey_the_schema(pool: str) -> None:
    from prefect.utilities.schema_tools import validate

    schema = json.loads((POOLS / f"{pool}.json").read_text())["variables"]
    values = {name: field["default"] for name, field in schema["properties"].items() if "default" in field}
    validate(values, schema, raise_on_error=True)


def test_a_process_inherits_the_workers_environment() -> None:
    configuration = rendered(ProcessJobConfiguration, "process")
    assert configuration.env.items() >= SECRETS.items()
    assert configuration.env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert configuration.working_dir is None
    assert configuration.command.endswith(" -m prefect.engine")


def container(**variables: Any) -> dict[str, Any]:
    """The body of the request that would create the container, as docker-py makes it."""
    from docker.models.containers import _create_container_args
    from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration

    configuration = rendered(DockerWorkerJobConfiguration, "docker", **variables)
    client = MagicMock()
    client.version.return_value = {"Version": "28.0.0"}
    worker = object.__new__(DockerWorker)
    settings = worker._build_container_settings(client, configuration)
    return _create_container_args({**settings, "version": "1.47"})


def test_a_container_has_a_gpu_a_user_and_its_volumes() -> None:
    created = container()
    host = created["host_config"]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert created["image"] == "darkroom-train"
    assert created["user"] == "1000:1000"
    assert created["stop_signal"] == "SIGTERM"
    assert "flow-run execute" in created["command"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert not host.get("Privileged")
    assert host["AutoRemove"]
    assert host["ShmSize"] == 2 << 30
    assert host["Binds"] == [
        "darkroom-state:/app/.darkroom",
        "darkroom-dvc-cache:/app/.dvc/cache",
        "/etc/darkroom/secrets.env:/run/secrets/darkroom.env:ro",
    ]
    assert created["environment"]["DARKROOM_PROJECT"] == "/app"
    assert created["environment"]["DARKROOM_STATE"] == "/app/.darkroom"


def test_a_deployment_can_ask_for_more_gpus_and_memory() -> None:
    created = container(gpus=-1, mem_limit="64g", shm_size="8g")
    assert created["host_config"]["DeviceRequests"][0]["Count"] == -1
    assert created["host_config"]["Memory"] == 64 << 30
    assert created["host_config"]["ShmSize"] == 8 << 30


FOREIGN = {
    "annotations": {"a": "b"},
    "args": ["touch", "/tmp/x"],
    "cluster_config": {},
    "command": "touch /tmp/x",
    "config_map": "other",
    "container_create_kwargs": {"privileged": True},
    "env": {"LD_PRELOAD": "/tmp/x.so", "PREFECT_API_URL": "http://page.example"},
    "env.LD_PRELOAD": "/tmp/x.so",
    "image": "page.example/image",
    "image_pull_policy": "Always",
    "job_manifest": {},
    "labels": {"a": "b"},
    "name": "other",
    "namespace": "kube-system",
    "network_mode": "host",
    "networks": ["other"],
    "privileged": True,
    "registry_credentials": {},
    "secret": "other",
    "service_account_name": "admin",
    "volumes": ["/:/host"],
    "working_dir": "/",
}


@pytest.mark.parametrize("pool", ["process", "docker", "kubernetes"])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_leads_to_running_code_is_no_variable_of_any_pool(pool: str, name: str) -> None:
    """The server refuses it, and the worker does not know it."""
    from prefect.utilities.schema_tools import ValidationError, validate

    template = json.loads((POOLS / f"{pool}.json").read_text())
    with pytest.raises(ValidationError):
        validate({name: FOREIGN[name]}, template["variables"], raise_on_error=True, preprocess=True)
    assert declared(template, FOREIGN | {"gpus": 2}) == ({} if pool == "process" else {"gpus": 2})


@pytest.mark.parametrize(
    ("pool", "values"),
    [
        ("docker", {"mem_limit": "{{ prefect.blocks.secret.other }}"}),
        ("docker", {"shm_size": "a"}),
        ("kubernetes", {"memory": "{{ prefect.variables.other }}"}),
        ("kubernetes", {"gpus": "1"}),
    ],
)
def test_variables_are_sizes_and_numbers(pool: str, values: dict[str, Any]) -> None:
    from prefect.utilities.schema_tools import ValidationError, validate

    schema = json.loads((POOLS / f"{pool}.json").read_text())["variables"]
    with pytest.raises(ValidationError):
        validate(values, schema, raise_on_error=True, preprocess=True)


def test_the_worker_of_the_stack_ignores_what_a_pool_does_not_declare() -> None:
    """In a process of its own: it changes Prefect's class, whose `env` comes through otherwise."""
    code = """
import asyncio, json, sys
import prefect.cli
prefect.cli.app = lambda: None
from flows.stack import prefect_worker
prefect_worker.main()
from prefect.workers.process import ProcessJobConfiguration
template = json.load(open("flows/pools/process.json"))
values = {"command": "touch x", "env": {"LD_PRELOAD": "x"}, "env.PATH": "x", "working_dir": "/"}
made = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, values, client=object()))
print(json.dumps([made.command, made.working_dir, made.env == template["job_configuration"]["env"]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=POOLS.parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [None, None, True]


def test_every_run_gets_the_heartbeat_that_the_automation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "heartbeat", lambda: 45)
    name = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    for pool in deploy.POOLS:
        client = MagicMock()
        client.read_work_pool.side_effect = ObjectNotFound(http_exc=Exception())
        assert deploy.set_pool(client, pool, POOLS / f"{pool}.json") == f"pool {pool}: created"
        environment = client.create_work_pool.call_args.args[0].base_job_template["job_configuration"]["env"]
        assert environment[name] == "45"


def job(**variables: Any) -> dict[str, Any]:
    """The Kubernetes job that would be created."""
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    manifest: dict[str, Any] = rendered(KubernetesWorkerJobConfiguration, "kubernetes", **variables).job_manifest
    return manifest


def test_a_job_has_a_gpu_a_user_its_volumes_and_time_to_save() -> None:
    manifest = job()
    assert manifest["spec"]["backoffLimit"] == 0, "the run is rescheduled by Prefect, not repeated by Kubernetes"
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 86400
    pod = manifest["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= GRACE + 15
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 1000, 1000)
    (run,) = pod["containers"]
    assert run["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}
    assert run["image"] == "darkroom-train"
    assert run["args"][-2:] == ["flow-run", "execute"]
    assert not run["securityContext"]["allowPrivilegeEscalation"]
    mounts = {mount["name"]: mount["mountPath"] for mount in run["volumeMounts"]}
    assert mounts == {"state": "/app/.darkroom", "dvc-cache": "/app/.dvc/cache", "shared-memory": "/dev/shm"}
    assert pod["volumes"] == [
        {"name": "state", "persistentVolumeClaim": {"claimName": "darkroom-state"}},
        {"name": "dvc-cache", "persistentVolumeClaim": {"claimName": "darkroom-dvc-cache"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    environment = {entry["name"]: entry["value"] for entry in run["env"]}
    assert environment["DARKROOM_PROJECT"] == "/app"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


def test_a_jobs_secrets_are_references() -> None:
    (run,) = job()["spec"]["template"]["spec"]["containers"]
    assert run["envFrom"] == [{"configMapRef": {"name": "darkroom"}}, {"secretRef": {"name": "darkroom"}}]


def test_the_job_is_one_that_kubernetes_knows() -> None:
    """The client's own classes read the pod, and give back every field."""
    from kubernetes_asyncio.client import ApiClient

    async def round_trip(content: Any) -> Any:
        async with ApiClient() as client:
            read = client.deserialize(SimpleNamespace(data=json.dumps(content)), "V1Job")
            return client.sanitize_for_serialization(read)

    manifest = job(node_selector={"nvidia.com/gpu.product": "NVIDIA-H100"})
    # Prefect's own check wants these two in the pod, where Kubernetes ignores them.
    for name in ("parallelism", "completions"):
        del manifest["spec"]["template"]["spec"][name]
    limits = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["nvidia.com/gpu"] = str(limits["nvidia.com/gpu"])  # a quantity, which may be a number too
    assert without_empty(asyncio.run(round_trip(manifest))) == without_empty(manifest)


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_empty(inner) for name, inner in value.items() if inner not in (None, {}, [])}
    return [without_empty(inner) for inner in value] if isinstance(value, list) else value


def test_no_secret_is_in_a_template_or_in_what_is_rendered() -> None:
    assert all(os.environ[name] == value for name, value in SECRETS.items())
    texts = [path.read_text() for path in POOLS.glob("*.json")] + [
        json.dumps(container(), default=str),
        json.dumps(job()),
    ]
    assert len(texts) == 5
    for text in texts:
        assert not [value for value in SECRETS.values() if value in text]
