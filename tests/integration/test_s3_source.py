"""Raw data from S3, over real HTTP: the same data set as from the folder, fetched once."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from mypy_boto3_s3 import S3Client
from PIL import Image

from darkroom.data import s3
from darkroom.data.packing import pack
from darkroom.data.sources import open_source
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.params import DataParams

BUCKET = "darkroom-raw"
URI = f"s3://{BUCKET}/sets/photos"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    """An S3 with an empty bucket, reached through the environment alone."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(root / name / f"{i} a.png")
    return root


def upload(client: S3Client, root: Path, prefix: str = "sets/photos") -> None:
    for path in root.rglob("*.png"):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(root).as_posix()}", Body=path.read_bytes())


def params(source: str) -> DataParams:
    return DataParams(source=source, image_size=8, channels=3, num_classes=2, test_fraction=0.25, seed=0)


def contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): digest_file(path) for path in directory.rglob("*") if path.is_file()
    }


def fetched(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().rpartition(", ")[2] for record in caplog.records if "to fetch" in record.getMessage()]


def test_bucket_gives_the_same_packed_bytes_as_the_folder(client: S3Client, photos: Path, tmp_path: Path) -> None:
    upload(client, photos)
    upload(client, photos, "sets/photos-of-others")  # another prefix that begins alike
    client.put_object(Bucket=BUCKET, Key="sets/photos/", Body=b"")  # what consoles make for a folder
    client.put_object(Bucket=BUCKET, Key="sets/photos/ant/labels.csv", Body=b"x")
    raw = tmp_path / "raw"
    from_s3 = pack(open_source(params(URI), tmp_path, raw), params(URI), tmp_path / "one")
    local = params(str(photos))
    from_folder = pack(open_source(local, tmp_path, raw), local, tmp_path / "two")
    assert from_s3 == from_folder
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(s3.fetch(URI + "/", raw)) == contents(photos)


def test_listing_of_many_pages_is_complete(
    client: S3Client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(client, photos)
    monkeypatch.setattr(s3, "_PAGE", 3)
    assert contents(s3.fetch(URI, tmp_path / "raw")) == contents(photos)


def test_second_run_downloads_only_what_changed(
    client: S3Client, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(client, photos)
    raw = tmp_path / "raw"
    directory = s3.fetch(URI, raw)
    times = {path: path.stat().st_mtime_ns for path in directory.rglob("*.png")}
    s3.fetch(URI, raw)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.png")} == times

    Image.new("RGB", (12, 9), "red").save(photos / "ant" / "0 a.png")
    (photos / "bee" / "7 a.png").unlink()
    upload(client, photos)
    client.delete_object(Bucket=BUCKET, Key="sets/photos/bee/7 a.png")
    (directory / "ant" / "1 a.png").write_bytes(b"damaged")
    s3.fetch(URI, raw)
    assert fetched(caplog) == ["16 to fetch", "0 to fetch", "2 to fetch"]
    assert contents(directory) == contents(photos)
    index = json.loads(directory.with_name(directory.name + ".json").read_text())
    assert list(index) == sorted(contents(photos))


def test_interrupted_download_is_not_taken_as_whole(
    client: S3Client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(client, photos)
    raw, copies = tmp_path / "raw", 0

    def breaks_off(source: object, target: object, length: int = 0) -> None:
        nonlocal copies
        copies += 1
        if copies > 5:
            target.write(b"half")  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        copyfileobj(source, target, length)  # type: ignore[arg-type]

    copyfileobj = shutil.copyfileobj
    monkeypatch.setattr(s3, "_AT_ONCE", 1)
    monkeypatch.setattr(shutil, "copyfileobj", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        s3.fetch(URI, raw)
    monkeypatch.undo()
    found = contents(raw)
    whole = contents(photos)
    directory = next(path for path in raw.rglob("*") if (path / "ant").is_dir())
    assert set(contents(directory).items()) < set(whole.items())  # nothing half, nothing temporary
    assert len(found) == 5 + 1  # and the index


def test_carries_on_after_an_interruption(
    client: S3Client, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(client, photos)
    directory = s3.fetch(URI, tmp_path / "raw")
    index_file = directory.with_name(directory.name + ".json")
    index = json.loads(index_file.read_text())
    (directory / "ant" / "0 a.png").unlink()  # recorded, gone
    del index["ant/1 a.png"]  # there, not recorded: a kill came between
    index_file.write_text(json.dumps(index))
    (directory / "ant" / ".2 a.png.abc.tmp").write_bytes(b"half")  # a kill came inside
    s3.fetch(URI, tmp_path / "raw")
    assert fetched(caplog)[1:] == ["2 to fetch"]
    assert contents(directory) == contents(photos)


def test_short_body_is_refused(client: S3Client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(client, photos)
    monkeypatch.setattr(shutil, "copyfileobj", lambda source, target, length=0: target.write(source.read(10)))
    with pytest.raises(InputError, match=r"10 of \d+ bytes received"):
        s3.fetch(URI, tmp_path / "raw")
    monkeypatch.undo()
    assert [path for path in contents(tmp_path / "raw") if path.endswith(".png")] == []


@pytest.mark.parametrize("key", ["ant/../../../escape.png", "/etc/x.png", "ant//x.png", "ant/..\\x.png", "./x.png"])
def test_key_that_would_escape_is_refused(client: S3Client, tmp_path: Path, key: str) -> None:
    entry = {"Key": f"sets/photos/{key}", "Size": 1, "ETag": '"x"'}

    class Listing:
        def get_paginator(self, _: str) -> "Listing":
            return self

        def paginate(self, **_: object) -> list[dict[str, object]]:
            return [{"Contents": [entry]}]

    with pytest.raises(InputError, match="cannot be a file below the folder"):
        s3._list(Listing(), URI, BUCKET, "sets/photos")  # type: ignore[arg-type]


def test_object_that_is_also_a_directory_is_refused(client: S3Client, tmp_path: Path) -> None:
    for key in ("sets/photos/a.png", "sets/photos/a.png/b.png"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    with pytest.raises(InputError, match="is also the directory of others"):
        s3.fetch(URI, tmp_path)


def test_refusals_say_why(client: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    def refused(uri: str) -> str:
        with pytest.raises(InputError) as error:
            s3.fetch(uri, tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused("s3://no-such-bucket/x") == f"s3://no-such-bucket/x: no bucket 'no-such-bucket' at {endpoint}"
    assert refused(URI).startswith(f"{URI}: no images below this prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    message = refused(URI)
    assert "cannot reach http://127.0.0.1:9" in message
    assert "AWS_ENDPOINT_URL" in message
    assert "hunter2" not in message
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert "no AWS credentials" in refused(URI)
    assert list(tmp_path.iterdir()) == []
