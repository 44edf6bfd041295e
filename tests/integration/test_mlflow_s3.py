"""Artifacts on S3, over real HTTP."""

from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from darkroom.registry.promotion import promote, register
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests.integration.registry_project import empty_database, workspace

__all__ = ["empty_database", "workspace"]  # fixtures


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; boto3 and MLflow, here and in child processes, find it through the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="models")
    yield "models"
    server.stop()


@pytest.mark.slow
def test_artifacts_live_on_s3_and_the_champion_is_loaded_from_there(
    workspace: Workspace, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_ARTIFACT_ROOT", f"s3://{bucket}/darkroom")
    registered = register(workspace)
    assert promote(workspace).promoted  # loads from S3 in a clean process and draws
    keys = [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]]
    assert all(key.startswith("darkroom/") for key in keys)
    assert any(key.endswith("artifacts/model/ema.safetensors") for key in keys)
    assert any(key.endswith(f"{registered.run_id}/artifacts/params.yaml") for key in keys)
    assert not (workspace.state / "artifacts").exists()
    weights = next(key for key in keys if key.endswith("ema.safetensors"))
    stored = boto3.client("s3").get_object(Bucket=bucket, Key=weights)["Body"].read()
    assert stored == (workspace.models / "ema.safetensors").read_bytes()
    assert connect(workspace).get_model_version_by_alias("digits", "champion").version in (1, "1")
