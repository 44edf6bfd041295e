"""The registry on real servers: PostgreSQL, MLflow's tracking server with artifacts on S3, and with sign-in."""

import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from darkroom.cli import main
from darkroom.files import digest_file, write_json
from darkroom.registry.aliases import version_at
from darkroom.registry.journal import experiment
from darkroom.registry.model_card import describe
from darkroom.registry.promotion import history, promote, register, rollback
from darkroom.registry.tracking import RegistryUnavailable, connect
from darkroom.registry.versions import store_score, stored_scores
from darkroom.workspace import Workspace
from tests import forks, s3
from tests.integration.registry_project import (
    empty_database,
    make_project,
    score_record,
    workspace,
    write_model,
    write_score,
)
from tests.servers import PASSWORD, Postgres, TrackingServer, postgres, tracking_server

__all__ = ["empty_database", "workspace"]  # fixtures

pytestmark = pytest.mark.slow

DRAW = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
drawn = model.predict(pd.DataFrame({"class_label": [0, 1], "seed": [7, 8]}))
print(json.dumps({"images": list(drawn["png"]), "weights": model.metadata.metadata["weights_digest"]}))
"""
SIGN_IN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    with s3.server() as endpoint:
        yield endpoint


def validated(project: Workspace) -> None:
    write_json(project.reports / "validation.json", {"success": True, "dataset": "d" * 64})


def second_model(project: Workspace) -> str:
    digest = write_model(project, 2)
    write_score(project, fid=0.4)
    return digest


def load_elsewhere(uri: str, directory: Path, **environment: str) -> dict[str, object]:
    """What an application gets that knows the registry's address alone."""
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY") if key in os.environ}
    directory.mkdir()
    command = [sys.executable, "-I", "-c", DRAW, uri]
    done = forks.run(command, cwd=directory, env=keep | environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def told(project: Workspace) -> list[tuple[str, str | None, str]]:
    return [(entry.outcome, entry.version_from, entry.version_to) for entry in history(project)]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0)


def test_a_server_on_postgres_with_artifacts_on_s3_that_dies_and_comes_back(
    workspace: Workspace, database: Postgres, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3.empty_bucket(storage, "mlflow", monkeypatch) as client:
        keys = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        server = TrackingServer(
            database.create("served"), "s3://mlflow/registry", tmp_path / "server", environment=keys
        )
        with tracking_server(server), monkeypatch.context() as ours:
            for name in keys:  # the server alone knows the bucket
                ours.delenv(name)
            ours.setenv("MLFLOW_TRACKING_URI", server.url)
            validated(workspace)
            first = (workspace.models / "ema.safetensors").read_bytes()
            assert register(workspace).created
            assert promote(workspace).promoted

            server.kill()
            second_model(workspace)
            with pytest.raises(RegistryUnavailable, match=server.url) as error:
                register(workspace)
            assert len(str(error.value).splitlines()) == 1
            server.start()

            assert (register(workspace).version, register(workspace).created) == ("2", False)
            assert promote(workspace).version == "2"
            assert rollback(workspace, "sevens are mirrored").version == "1"
            expected = [("promoted", None, "1"), ("promoted", "1", "2"), ("rolled back", "2", "1")]
            assert told(workspace) == expected
        names = [entry["Key"] for entry in client.list_objects_v2(Bucket="mlflow")["Contents"]]
        assert all(name.startswith("registry/") for name in names)
        stored = [name for name in names if name.endswith("ema.safetensors")]
        assert len(stored) == 2
        assert first in [client.get_object(Bucket="mlflow", Key=name)["Body"].read() for name in stored]


def test_postgres_without_a_server_and_its_password_is_never_shown(
    workspace: Workspace,
    database: Postgres,
    storage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with s3.empty_bucket(storage, "direct", monkeypatch):
        uri = database.create("direct")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("DARKROOM_ARTIFACT_ROOT", "s3://direct/registry")
        monkeypatch.chdir(workspace.root)
        validated(workspace)
        assert command("register") == 0
        assert command("promote") == 0
        keys = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        found = load_elsewhere("models:/digits@champion", tmp_path / "app", MLFLOW_TRACKING_URI=uri, **keys)
        assert found["weights"] == digest_file(workspace.models / "ema.safetensors")
        assert len(set(found["images"])) == 2  # type: ignore[call-overload]
        assert command("rollback", "--reason", "there is nothing before it") == 2
        assert told(workspace) == [("promoted", None, "1")]
        names = [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket="direct")["Contents"]]
        assert all(name.startswith("registry/") for name in names)
        database.stop()
        try:
            assert command("register") == 69
        finally:
            database.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace(":a-database", ":another"))
        assert command("register") == 69
        assert command("history") == 69
        printed = "".join(capfd.readouterr())
        assert printed.count(f"MLflow at postgresql://darkroom:***@127.0.0.1:{database.port}/direct") == 3
        for secret in (PASSWORD, "database%27s", "another%27s", "another's"):
            assert secret not in printed


def test_the_record_of_a_thousand_classes_fits_into_postgres(
    workspace: Workspace, database: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite holds text of any length; of a version's tags PostgreSQL does too, of its description it does not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.create("classes"))
    record = score_record()
    for part in ("unguided", "guided", "floor"):
        score = getattr(record, part).model_copy(update={"class_accuracies": [1 / 3] * 1000})
        record = record.model_copy(update={part: score})
    assert len(record.model_dump_json()) > 50_000
    client = connect(workspace)
    client.create_registered_model("digits")
    client.create_model_version("digits", source="file:///nowhere", run_id=None)
    store_score(client, "digits", client.get_model_version("digits", "1"), record)
    version = client.get_model_version("digits", "1")
    assert stored_scores(version) == {record.protocol_digest: record}
    card = "\n\n## ".join(["# digits", *("words " * 100 for _ in range(20))])
    client.update_model_version("digits", "1", description=describe(card))
    with pytest.raises(Exception, match="too long"):
        client.update_model_version("digits", "1", description=card)


@pytest.mark.parametrize("kind", ["PostgreSQL", "SQLite"])
def test_the_first_use_of_a_database_by_several_at_once(
    kind: str, database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one checkout and two of others: MLflow's own migrations crash when they run side by side."""
    monkeypatch.delenv("DARKROOM_STATE", raising=False)
    program = """
        import os, sys
        from pathlib import Path
        from darkroom.registry.runs import ensure_experiment
        from darkroom.registry.tracking import connect, import_mlflow
        from darkroom.workspace import Workspace
        import_mlflow()
        import mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
        waits, starts = os.pipe()
        children = []
        for root in sys.argv[1:]:
            child = os.fork()
            if not child:
                os.read(waits, 1)
                workspace = Workspace(Path(root))
                client = connect(workspace)
                made = ensure_experiment(client, workspace, "digits")
                os._exit(client.get_experiment_by_name("digits").experiment_id != made)
            children.append(child)
        os.write(starts, b"go" * len(children))
        print([os.waitpid(child, 0)[1] for child in children])
    """
    fresh = database.create("fresh") if kind == "PostgreSQL" else f"sqlite:///{tmp_path}/fresh.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fresh)
    projects = [str(make_project(tmp_path / name).root) for name in ("one", "another", "a third")]
    command = [sys.executable, "-c", textwrap.dedent(program), projects[0], *projects]
    done = forks.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.stdout == "[0, 0, 0, 0]\n", done.stderr


@pytest.mark.soak  # the server works on a password at each request
def test_sign_in(
    workspace: Workspace,
    database: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    admin, reader = ("admin", "an-admin's-password"), ("reader", "a-reader's-password")
    settings = tmp_path / "sign-in.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\nadmin_password = an-admin's-password\n"
        f"database_uri = sqlite:///{tmp_path / 'users.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = TrackingServer(
        database.create("guarded"),
        (tmp_path / "artifacts").as_uri(),
        tmp_path / "server",
        app="basic-auth",
        environment={"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32},
    )

    def sign_in(user: tuple[str, str]) -> None:
        for name, value in zip(SIGN_IN, user, strict=True):
            monkeypatch.setenv(name, value)

    with tracking_server(server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        monkeypatch.chdir(workspace.root)
        validated(workspace)
        capfd.readouterr()
        assert command("register") == 1
        unknown = capfd.readouterr().err
        sign_in(("admin", "a wrong one"))
        assert command("register") == 1
        wrong = capfd.readouterr().err
        for error in (unknown, wrong):
            assert error.count("\n") == 1, error
            assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in error
        assert "'admin'" in wrong

        sign_in(admin)
        assert command("register") == 0
        assert "View run" not in capfd.readouterr().out
        connect(workspace).create_experiment(experiment("digits"))  # as an earlier promotion leaves it
        create_user(server, reader)
        sign_in(reader)
        access = dict(zip(SIGN_IN, reader, strict=True))
        app = load_elsewhere("models:/digits@challenger", tmp_path / "app", MLFLOW_TRACKING_URI=server.url, **access)
        assert len(set(app["images"])) == 2  # type: ignore[call-overload]
        capfd.readouterr()
        assert command("history") == 0
        assert command("promote") == 1
        denied = capfd.readouterr().err
        assert denied.count("\n") == 1, denied
        assert "user 'reader' may not do this" in denied
        sign_in(admin)
        assert told(workspace) == []
        assert version_at(connect(workspace), "digits", "champion") is None
        printed = unknown + wrong + denied + server.log
        for secret in (admin[1], reader[1], "a wrong one"):
            assert secret not in printed


def create_user(server: TrackingServer, user: tuple[str, str]) -> None:
    from mlflow.server.auth.client import AuthServiceClient

    AuthServiceClient(server.url).create_user(*user)
