"""Extractor weights from paths, S3 and MLflow: the right file or one line, and never a wrong or half a file kept."""

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mypy_boto3_s3 import S3Client

from darkroom.errors import InputError
from darkroom.files import write_bytes
from darkroom.registry.extractor_weights import (
    INCEPTION_FILE,
    INCEPTION_URL,
    STATISTICS_FILE,
    fetch_file,
    find_inception,
    find_statistics,
)
from darkroom.registry.tracking import RegistryUnavailable, connect, current, tracking_uri
from darkroom.workspace import Workspace
from tests.integration.registry_project import empty_database
from tests.s3 import Fault, Proxy, empty_bucket, faulty, first, server, without_pauses
from tests.servers import TrackingServer, tracking_server

__all__ = ["empty_database"]  # a fixture

BUCKET = "darkroom-extractors"
VARIABLE = "DARKROOM_INCEPTION_WEIGHTS"
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name in (VARIABLE, "DARKROOM_REFERENCE_STATISTICS", "DARKROOM_STATE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Workspace(tmp_path / "project")


def kept(workspace: Workspace) -> Path:
    return workspace.state / "extractors" / INCEPTION_FILE


def keep(workspace: Workspace, content: bytes) -> Path:
    path = kept(workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(workspace: Workspace, sha256: str = SHA256) -> str:
    """The message; nothing is in the store afterwards that was not there before."""
    directory = kept(workspace).parent
    before = {path: path.read_bytes() for path in directory.glob("*")} if directory.exists() else {}
    with pytest.raises(InputError) as error:
        find_inception(workspace, sha256)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in directory.glob("*")} == before
    return str(error.value)


def test_a_path_is_used_where_it_is(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "elsewhere" / "w.pth"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    monkeypatch.setenv(VARIABLE, str(path))
    for prefix in (SHA256, SHA256[:8], SHA256[:8].upper()):
        assert find_inception(workspace, prefix) == path
    workspace.root.mkdir()
    monkeypatch.setenv(VARIABLE, "../elsewhere/w.pth")  # relative to the project
    assert find_inception(workspace, SHA256).samefile(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/elsewhere/w.pth")
    assert find_inception(workspace, SHA256) == path
    assert not workspace.state.exists()


def test_without_the_variable_it_is_where_fetched_files_are_kept(workspace: Workspace) -> None:
    path = keep(workspace, CONTENT)
    assert find_inception(workspace, SHA256) == path


def test_a_wrong_file_is_refused_by_its_digest(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = keep(workspace, CONTENT[:-1])
    digest = hashlib.sha256(CONTENT[:-1]).hexdigest()
    expected = f"{path}: its sha256 is {digest}, expected 6726825d…: damaged, or another file"
    assert refusal(workspace, "6726825d") == expected
    assert refusal(workspace).endswith(f"expected {SHA256}: damaged, or another file")
    monkeypatch.setenv(VARIABLE, str(path))
    assert refusal(workspace, "6726825d") == expected


def test_a_missing_file_tells_how_to_get_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as error:
        find_inception(workspace, "6726825d")
    message = str(error.value)
    assert message.startswith(f"{kept(workspace)}: no such file, and {VARIABLE} is not set; it takes a path, an s3://")
    assert f"\n  curl -L --create-dirs -o '{kept(workspace)}' {INCEPTION_URL}" in message
    assert "95.7 MB" in message
    assert INCEPTION_URL == (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    )
    assert "curl" not in refusal(workspace, "0" * 8), "that URL would give another file"
    monkeypatch.setenv(VARIABLE, "absent.pth")
    with pytest.raises(InputError) as error:
        find_inception(workspace, "6726825d")
    assert str(error.value).startswith(f"{workspace.root / 'absent.pth'}: no such file\n")


@pytest.mark.parametrize("digest", ["6726825", "6726825g", "", "a" * 65, "6726825d\n"])
def test_what_is_no_digest_is_refused(workspace: Workspace, digest: str) -> None:
    keep(workspace, CONTENT)
    assert "must be 8 to 64 hexadecimal digits" in refusal(workspace, digest)


@pytest.mark.parametrize("value", ["https://example.org/w.pth", "gs://bucket/w.pth", "file:///w.pth"])
def test_other_uris_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert refusal(workspace).startswith(f"{VARIABLE} = {value!r}: expected a path, an s3://bucket/key URI or ")


def test_a_directory_is_one_line(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert refusal(workspace) == f"{tmp_path}: cannot be read: Is a directory"


def test_statistics_are_found_the_same_way(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="DARKROOM_REFERENCE_STATISTICS is not set") as error:
        find_statistics(workspace, SHA256)
    assert "\n" not in str(error.value)
    path = workspace.state / "extractors" / STATISTICS_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert find_statistics(workspace, SHA256) == path
    other = workspace.root / "fid.npz"
    other.write_bytes(CONTENT + b"2")
    monkeypatch.setenv("DARKROOM_REFERENCE_STATISTICS", "fid.npz")
    assert find_statistics(workspace, hashlib.sha256(CONTENT + b"2").hexdigest()) == other


# S3


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    with empty_bucket(endpoint, BUCKET, monkeypatch) as client:
        client.put_object(Bucket=BUCKET, Key="fid/w.pth", Body=CONTENT, ChecksumAlgorithm="SHA256")
        yield client


@pytest.fixture
def proxy(client: S3Client, endpoint: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What the code under test takes for S3; the variable names an object there."""
    without_pauses(monkeypatch)
    with faulty(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv(VARIABLE, f"s3://{BUCKET}/fid/w.pth")
        yield proxy


def test_an_object_is_fetched_once_and_then_used_without_s3(
    workspace: Workspace, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = find_inception(workspace, SHA256)
    assert (path, path.read_bytes()) == (kept(workspace), CONTENT)
    assert list(path.parent.iterdir()) == [path]
    proxy.requests.clear()
    assert find_inception(workspace, SHA256[:8]) == path
    monkeypatch.delenv(VARIABLE)
    assert find_inception(workspace, SHA256) == path
    assert proxy.requests == []


def test_a_large_object_comes_whole(workspace: Workspace, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.registry.extractor_weights.RANGED_ABOVE", 1000)
    monkeypatch.setattr("darkroom.data.s3.ranges.RANGE", 1000)
    assert find_inception(workspace, SHA256).read_bytes() == CONTENT
    assert len(proxy.gets("w.pth")) == 7
    assert list(kept(workspace).parent.iterdir()) == [kept(workspace)]


def test_a_damaged_file_is_replaced_by_a_fetched_one(workspace: Workspace, proxy: Proxy) -> None:
    keep(workspace, b"half")
    assert find_inception(workspace, SHA256).read_bytes() == CONTENT


def test_a_wrong_object_is_not_kept_and_what_is_there_stays(workspace: Workspace, proxy: Proxy) -> None:
    expected = f"s3://{BUCKET}/fid/w.pth: its sha256 is {SHA256}, expected 6726825d…: damaged, or another file"
    assert refusal(workspace, "6726825d") == expected
    keep(workspace, b"of an earlier time")
    assert refusal(workspace, "6726825d") == expected


def test_leavings_of_a_killed_fetch_are_removed(workspace: Workspace, proxy: Proxy) -> None:
    leavings = kept(workspace).with_name(f".{INCEPTION_FILE}.abcdefgh.tmp")
    leavings.mkdir(parents=True)
    (leavings / INCEPTION_FILE).write_bytes(b"half")
    find_inception(workspace, SHA256)
    assert list(kept(workspace).parent.iterdir()) == [kept(workspace)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"s3://{BUCKET}/fid/other.pth", f"s3://{BUCKET}/fid/other.pth: no such object"),
        (f"s3://{BUCKET}/fid", f"s3://{BUCKET}/fid: no such object"),
        (f"s3://{BUCKET}", f"s3://{BUCKET}: no such object"),
        ("s3://no-such-bucket-here/w.pth", "s3://no-such-bucket-here/w.pth: no bucket 'no-such-bucket-here' at "),
        ("s3://Bad_Bucket/w.pth", f"{VARIABLE} = 's3://Bad_Bucket/w.pth': expected s3://bucket/"),
    ],
)
def test_what_s3_does_not_have_is_one_line(
    workspace: Workspace, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert refusal(workspace).startswith(message)


def test_no_permission_and_a_server_that_is_down_are_one_line(
    workspace: Workspace, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = lambda _: Fault(403, "AccessDenied")
    assert refusal(workspace).endswith(f"they need s3:ListBucket and s3:GetObject on {BUCKET!r}")
    proxy.fault = first(10**6, Fault(keep=100), name="w.pth")
    assert "the connection broke off" in refusal(workspace)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert "cannot reach" in refusal(workspace)


def test_a_full_disk_is_one_line(workspace: Workspace, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left on device" in refusal(workspace)


def test_a_state_that_cannot_be_written_is_one_line(
    workspace: Workspace, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.root.mkdir()
    (workspace.root / "file").write_bytes(b"")
    monkeypatch.setenv("DARKROOM_STATE", "file")
    with pytest.raises(InputError, match="Not a directory"):
        find_inception(workspace, SHA256)


def test_two_at_once_are_told_apart(workspace: Workspace, proxy: Proxy) -> None:
    seen = []

    def meanwhile(_: object) -> None:
        if not seen:
            with pytest.raises(InputError) as error:
                find_inception(workspace, SHA256)
            seen.append(str(error.value))

    proxy.fault = meanwhile
    assert find_inception(workspace, SHA256).read_bytes() == CONTENT
    assert seen == [
        f"s3://{BUCKET}/fid/w.pth: another process is fetching into {kept(workspace).parent}; wait until it is done"
    ]


# MLflow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Path:
    """A project's state with MLflow's tables and a run with an artifact in files; its id is the text of `run`."""
    root = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DARKROOM_STATE", "DARKROOM_ARTIFACT_ROOT"):
            patch.delenv(name, raising=False)
        project = Workspace(root)
        write_bytes(project.state / "mlflow.db", empty_database)
        client = connect(project)
        experiment = client.create_experiment("files", artifact_location=(root / "artifacts").as_uri())
        (root / "run").write_text(log_weights(project, experiment))
    return root


def log_weights(project: Workspace, experiment: str) -> str:
    """A run with the weights as artifact `extractor/w.pth`; returns its id."""
    client = connect(project)
    run = str(client.create_run(experiment).info.run_id)
    (project.root / "w.pth").write_bytes(CONTENT)
    with current(tracking_uri(project)):
        client.log_artifact(run, str(project.root / "w.pth"), "extractor")
    return run


@pytest.fixture
def run(database: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database / '.darkroom' / 'mlflow.db'}")
    return (database / "run").read_text()


def test_an_artifact_of_a_run_is_fetched_once(workspace: Workspace, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"runs:/{run}/extractor/w.pth")
    path = find_inception(workspace, SHA256)
    assert (path, path.read_bytes()) == (kept(workspace), CONTENT)
    assert list(path.parent.iterdir()) == [path]
    assert "mlflow.db" in os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody is asked any more
    assert find_inception(workspace, SHA256) == path


def test_a_file_of_a_registered_model_is_fetched(
    workspace: Workspace, database: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(workspace)
    client.create_registered_model("fid")
    client.create_model_version("fid", source=(database / "artifacts" / run / "artifacts").as_uri(), run_id=run)
    client.set_registered_model_alias("fid", "champion", "1")
    for number, uri in enumerate(("models:/fid@champion/extractor/w.pth", "models:/fid/1/extractor/w.pth")):
        monkeypatch.setenv(VARIABLE, uri)
        assert fetch_file(workspace, VARIABLE, f"copy-{number}", SHA256).read_bytes() == CONTENT


def test_a_wrong_artifact_is_not_kept(workspace: Workspace, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"runs:/{run}/extractor/w.pth"
    monkeypatch.setenv(VARIABLE, uri)
    assert refusal(workspace, "6726825d").startswith(f"{uri}: its sha256 is {SHA256}, expected 6726825d…")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("runs:/RUN/extractor/v.pth", "no such file; runs:/RUN/extractor has w.pth"),
        ("runs:/RUN/extractor", "no such file; runs:/RUN has extractor"),
        ("runs:/RUN/elsewhere/w.pth", "no such file; runs:/RUN/elsewhere has none"),
        (f"runs:/{'0' * 32}/w.pth", f"Run with id={'0' * 32} not found"),
        ("runs:/", "names no file of a run, a model or a server; expected a path, "),
        ("models:/absent@champion", "names no file of a run, a model or a server; expected a path, "),
        ("runs:/RUN/extractor/", "names no file of a run, a model or a server; expected a path, "),
        ("models:/absent@champion/w.pth", "Registered Model with name=absent not found"),
        ("models:/absent/3/w.pth", "Registered Model with name=absent not found"),
        (
            "mlflow-artifacts:/1/w.pth",
            "When an mlflow-artifacts URI was supplied, the tracking URI must be a valid http",
        ),
    ],
)
def test_what_mlflow_does_not_have_is_one_line(
    workspace: Workspace, run: str, monkeypatch: pytest.MonkeyPatch, uri: str, message: str
) -> None:
    uri = uri.replace("RUN", run)
    monkeypatch.setenv(VARIABLE, uri)
    assert refusal(workspace).startswith(f"{uri}: {message.replace('RUN', run)}")


def test_too_little_room_is_refused_before_the_first_byte(
    workspace: Workspace, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkroom.data.s3.download.disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    monkeypatch.setenv(VARIABLE, f"runs:/{run}/extractor/w.pth")
    assert refusal(workspace).endswith(f"has {len(CONTENT) - 1:,} bytes free")


@pytest.mark.slow
def test_an_artifact_store_that_is_down_is_one_line(
    workspace: Workspace, database: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server of its own: MLflow keeps its client, whatever the environment says later.
    with server() as url, empty_bucket(url, BUCKET, monkeypatch):
        experiment = connect(workspace).create_experiment("s3", artifact_location=f"s3://{BUCKET}/artifacts")
        on_s3 = log_weights(Workspace(database), experiment)
        monkeypatch.setenv(VARIABLE, f"runs:/{on_s3}/extractor/w.pth")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        assert find_inception(workspace, SHA256).read_bytes() == CONTENT
    kept(workspace).unlink()
    assert "Could not connect to the endpoint" in refusal(workspace)


@pytest.mark.slow
def test_artifacts_that_a_server_hands_out_are_fetched_and_a_server_that_is_gone_is_one_line(
    workspace: Workspace, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = f"sqlite:///{Workspace(database).state / 'mlflow.db'}"
    with tracking_server(TrackingServer(backend, str(tmp_path / "served"), tmp_path / "server")) as served:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", served.url)
        tracking = connect(workspace)
        run = log_weights(Workspace(tmp_path), tracking.create_experiment("served"))
        root = tracking.get_run(run).info.artifact_uri
        assert root.startswith("mlflow-artifacts:/")
        monkeypatch.setenv(VARIABLE, f"{root}/extractor/w.pth")
        assert find_inception(workspace, SHA256).read_bytes() == CONTENT
        kept(workspace).unlink()
        monkeypatch.setenv(VARIABLE, f"{root}/extractor/v.pth")
        assert refusal(workspace).endswith(f"no such file; {root}/extractor has w.pth")
    with pytest.raises(RegistryUnavailable, match="does not answer") as error:
        find_inception(workspace, SHA256)
    assert "\n" not in str(error.value)
    assert list(kept(workspace).parent.iterdir()) == []
