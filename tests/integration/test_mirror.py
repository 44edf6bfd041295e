"""A training's checkpoints on S3, over real HTTP: a machine can vanish with all its disks."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from mypy_boto3_s3 import S3Client

from darkroom.errors import InputError, StageFailed
from darkroom.files import digest_file
from darkroom.registry.mirror import SETTING, S3Mirror
from darkroom.training.checkpoints import Saver, load_newest, locked
from tests.s3 import empty_bucket, server

BUCKET = "darkroom-checkpoints"
URI = f"s3://{BUCKET}/runs"
FINGERPRINT = "f" * 64
START = f"runs/{FINGERPRINT}/"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    with empty_bucket(endpoint, BUCKET, monkeypatch) as client:
        yield client


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / FINGERPRINT


def state(step: int) -> dict[str, torch.Tensor]:
    return {"raw.x": torch.arange(1000.0) + step}


def train(directory: Path, *steps: int, keep: int = 2) -> None:
    """Start as the train stage does, save these steps, end."""
    with locked(directory):
        mirror = S3Mirror(URI, FINGERPRINT)
        mirror.pull(directory)
        for step in steps:
            with (directory / "history.jsonl").open("a") as history:
                history.write(f'{{"step": {step}}}\n')
            saver = Saver(directory, FINGERPRINT, keep=keep, mirror=mirror)
            saver.save(step, state(step))
            saver.close()


def objects(client: S3Client) -> list[str]:
    entries = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return sorted(entry["Key"].removeprefix(START) for entry in entries)


def files_of(*steps: int) -> list[str]:
    return [f"step-{step:09d}.{ending}" for step in steps for ending in ("json", "safetensors")]


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(directory).as_posix(): digest_file(path) for path in files}


def own(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the project logged; the S3 server in this process logs as well."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("darkroom")]


def test_a_lost_directory_comes_back_with_equal_bytes(client: S3Client, directory: Path) -> None:
    snapshots = directory / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "step-000000003-width-0.050.safetensors").write_bytes(bytes(100))
    (snapshots / "snapshots.json").write_text("{}")
    train(directory, 4, 8, 12)
    companions = ["history.jsonl", "snapshots/snapshots.json", "snapshots/step-000000003-width-0.050.safetensors"]
    assert objects(client) == sorted([*companions, *files_of(8, 12)])
    before = contents(directory)
    shutil.rmtree(directory)

    train(directory)
    assert contents(directory) == {name: digest for name, digest in before.items() if name not in files_of(8)}
    found = load_newest(directory, FINGERPRINT)
    assert found is not None
    assert found.step == 12
    assert torch.equal(found.tensors["raw.x"], state(12)["raw.x"])
    assert objects(client) == sorted([*companions, *files_of(8, 12)])  # step 8 stays until there is a newer one
    train(directory, 16)
    assert objects(client) == sorted([*companions, *files_of(12, 16)])


def test_the_directory_wins_when_it_is_as_new(
    client: S3Client, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(directory, 4, 8)
    (directory / "history.jsonl").write_text("newer than the mirror's\n")
    before = contents(directory)
    caplog.set_level(logging.INFO, "darkroom")
    train(directory)
    assert contents(directory) == before
    assert own(caplog) == []


@pytest.mark.parametrize("harm", ["damaged here", "older here"])
def test_the_mirror_wins_when_the_directory_holds_nothing_whole_as_new(
    client: S3Client, directory: Path, harm: str
) -> None:
    train(directory, 4, 8)
    before = contents(directory)
    newest = directory / files_of(8)[1]
    if harm == "damaged here":
        newest.write_bytes(newest.read_bytes()[:-1])
    else:
        newest.with_suffix(".json").unlink()
        newest.unlink()
    train(directory)
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("truncated", "it is truncated"),
        ("tampered", "it was changed after it was written"),
        ("missing", f"{files_of(8)[1]} is missing"),
        ("voucher", f"its voucher {files_of(8)[0]} is damaged"),
        ("another", "it belongs to another training"),
    ],
)
def test_a_damaged_object_is_passed_over(
    client: S3Client, directory: Path, caplog: pytest.LogCaptureFixture, harm: str, reason: str
) -> None:
    train(directory, 4, 8)
    voucher, tensors = (START + name for name in files_of(8))
    content = client.get_object(Bucket=BUCKET, Key=tensors)["Body"].read()
    if harm == "truncated":
        client.put_object(Bucket=BUCKET, Key=tensors, Body=content[:-1])
    elif harm == "tampered":
        client.put_object(Bucket=BUCKET, Key=tensors, Body=content[:-1] + b"?")
    elif harm == "missing":
        client.delete_object(Bucket=BUCKET, Key=tensors)
    elif harm == "voucher":
        client.put_object(Bucket=BUCKET, Key=voucher, Body=b"{")
    else:
        text = client.get_object(Bucket=BUCKET, Key=voucher)["Body"].read()
        client.put_object(Bucket=BUCKET, Key=voucher, Body=text.replace(b"ffff", b"eeee"))
    shutil.rmtree(directory)
    train(directory)
    (line,) = own(caplog)
    assert line.startswith(f"checkpoint {files_of(8)[1]} of {URI} is passed over: {reason}")
    found = load_newest(directory, FINGERPRINT)
    assert found is not None
    assert found.step == 4
    assert not list(directory.glob(".*"))
    train(directory, 6)
    assert objects(client) == ["history.jsonl", *files_of(4, 6)]  # the damaged one is gone


def test_a_checkpoint_without_its_voucher_does_not_count(client: S3Client, directory: Path) -> None:
    train(directory, 4, 8)
    client.delete_object(Bucket=BUCKET, Key=START + files_of(8)[0])  # killed before it was uploaded
    shutil.rmtree(directory)
    train(directory)
    found = load_newest(directory, FINGERPRINT)
    assert found is not None
    assert found.step == 4


def test_trainings_do_not_see_each_other(client: S3Client, directory: Path, tmp_path: Path) -> None:
    train(directory, 4)
    other = tmp_path / "other"
    with locked(other):
        S3Mirror(URI, "e" * 64).pull(other)
        assert load_newest(other, "e" * 64) is None
    assert objects(client) == ["history.jsonl", *files_of(4)]


def test_names_that_lead_out_of_the_directory_are_left_alone(client: S3Client, directory: Path) -> None:
    train(directory, 4)
    for name in ("../../escape", "snapshots/../../escape", "/escape", "snapshots//x", ".hidden", "lock"):
        client.put_object(Bucket=BUCKET, Key=START + name, Body=b"x")
    before = contents(directory)
    shutil.rmtree(directory)
    train(directory)
    assert contents(directory) == before
    assert [path.name for path in directory.parent.parent.iterdir()] == ["checkpoints"]
    assert "x" not in (directory / "lock").read_text()


def test_tensors_are_uploaded_once(client: S3Client, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = directory / "snapshots" / "step-000000003-width-0.050.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(bytes(100))
    time.sleep(1.1)  # S3 tells the time of an upload in seconds
    train(directory, 4)
    uploads: list[str] = []
    upload = S3Mirror._connected

    def recording(mirror: S3Mirror):  # type: ignore[no-untyped-def]
        context = upload(mirror)
        if mirror._client and not hasattr(mirror._client, "recorded"):
            original = mirror._client.upload_file
            mirror._client.recorded = True  # type: ignore[attr-defined]
            mirror._client.upload_file = lambda file, *rest: (uploads.append(Path(file).name), original(file, *rest))  # type: ignore[method-assign,assignment,func-returns-value]
        return context

    monkeypatch.setattr(S3Mirror, "_connected", recording)
    train(directory, 8)  # another process, the same disk
    assert uploads == [files_of(8)[1]]
    shutil.rmtree(directory)
    train(directory, 12)  # another machine
    assert uploads == [files_of(8)[1], files_of(12)[1]]
    snapshot.write_bytes(bytes(99) + b"1")
    train(directory, 16)
    assert uploads[2:] == [snapshot.name, files_of(16)[1]] or uploads[2:] == [files_of(16)[1], snapshot.name]


def test_a_server_that_is_down_during_training_is_only_logged(
    client: S3Client, directory: Path, endpoint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanishing = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    vanishing.start()
    host, port = vanishing.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3").create_bucket(Bucket="vanishing-bucket")
    uri = "s3://vanishing-bucket/runs"
    mirror = S3Mirror(uri, FINGERPRINT)
    with locked(directory):
        mirror.pull(directory)
        saver = Saver(directory, FINGERPRINT, mirror=mirror)
        saver.save(4, state(4), wait=True)
        saver.close()
        vanishing.stop()
        for step in (8, 12):
            saver.save(step, state(step), wait=True)
            saver.close()
    assert sorted(contents(directory)) == files_of(8, 12)
    reason = f"{uri}: cannot reach http://{host}:{port} (EndpointConnectionError); AWS_ENDPOINT_URL sets the endpoint"
    assert own(caplog) == [
        f"{files_of(step)[1]} was not mirrored: {reason}; training goes on, the next save tries again"
        for step in (8, 12)
    ]


def test_what_was_not_mirrored_is_with_the_next_save(
    client: S3Client, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(directory, 4, keep=1)
    mirror = S3Mirror(URI, FINGERPRINT)
    mirror.pull(directory)
    saver = Saver(directory, FINGERPRINT, keep=1, mirror=mirror)
    with monkeypatch.context() as patch:
        patch.setattr(S3Mirror, "push", lambda *_: (_ for _ in ()).throw(RuntimeError("no\nnetwork")))
        saver.save(8, state(8))
        saver.close()
    assert "step-000000008.safetensors was not mirrored: RuntimeError: no network; training goes on" in caplog.text
    assert objects(client) == [
        "history.jsonl",
        *files_of(4),
    ]  # the last good one is not dropped before there is another
    saver.save(12, state(12))
    saver.close()
    assert objects(client) == ["history.jsonl", *files_of(12)]


def test_a_slow_mirror_holds_up_neither_training_nor_saves(
    client: S3Client, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, pushed, push = threading.Event(), [], S3Mirror.push

    def slow(mirror: S3Mirror, files: list[Path]) -> None:
        pushed.append(files[0].name)
        assert go.wait(20)
        push(mirror, files)

    monkeypatch.setattr(S3Mirror, "push", slow)
    mirror = S3Mirror(URI, FINGERPRINT)
    mirror.pull(directory)
    saver = Saver(directory, FINGERPRINT, keep=1, mirror=mirror)
    for step in (4, 8, 12, 16):
        saver.save(step, state(step), wait=True)
        assert saver.seconds_of_last < 5
    newest = load_newest(directory, FINGERPRINT)
    assert newest is not None
    assert newest.step == 16
    go.set()
    saver.close()
    assert list(dict.fromkeys(pushed)) == [files_of(4)[1], files_of(16)[1]]  # what came in between is skipped
    assert objects(client) == files_of(16)


def test_a_step_that_was_cut_short_there_is_kept_when_it_is_saved_again(client: S3Client, directory: Path) -> None:
    train(directory, 4)
    client.put_object(Bucket=BUCKET, Key=f"{START}{files_of(8)[1]}", Body=b"a machine vanished here")
    mirror = S3Mirror(URI, FINGERPRINT)
    mirror.pull(directory)
    saver = Saver(directory, FINGERPRINT, keep=1, mirror=mirror)
    saver.save(8, state(8), wait=True)
    saver.close()
    assert set(objects(client)) >= set(files_of(8))


def test_refusals_at_the_start_say_why(
    client: S3Client, directory: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pull() -> None:
        mirror = S3Mirror.from_environment(FINGERPRINT)
        assert mirror is not None
        mirror.pull(directory)

    def refused(uri: str) -> str:
        monkeypatch.setenv(SETTING, uri)
        with pytest.raises(InputError) as error:
            pull()
        assert "\n" not in str(error.value)
        return str(error.value)

    for uri in ("/mnt/checkpoints", BUCKET, "s3://", "s3://UPPER/x", "https://host/bucket", f"s3://{BUCKET}/a/../b"):
        assert refused(uri) == f"{SETTING} = {uri!r}: expected s3://bucket/prefix"
    assert refused("s3://no-such-bucket/x") == f"s3://no-such-bucket/x: no bucket 'no-such-bucket' at {endpoint}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    assert refused(URI).startswith(f"{URI}: cannot reach http://127.0.0.1:9 (")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no AWS credentials" in refused(URI)
    assert not directory.exists()
    monkeypatch.delenv(SETTING)
    assert S3Mirror.from_environment(FINGERPRINT) is None


def test_a_directory_that_cannot_take_the_files_is_one_line(client: S3Client, directory: Path, tmp_path: Path) -> None:
    train(directory, 4)
    (tmp_path / "file").touch()
    with pytest.raises(StageFailed, match=rf"cannot take what {URI} holds: Not a directory"):
        S3Mirror(URI, FINGERPRINT).pull(tmp_path / "file" / "below")
