"""Raw data from S3, over real HTTP: the same data set as from the folder, fetched once."""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mypy_boto3_s3 import S3Client
from PIL import Image

from darkroom.data.packing import pack
from darkroom.data.s3 import fetching, listing
from darkroom.data.s3.sync import sync
from darkroom.data.sources import open_source
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.params import DataParams
from darkroom.workspace import Workspace
from tests.s3 import empty_bucket, server, without_pauses

BUCKET = "darkroom-raw"
URI = f"s3://{BUCKET}/sets/photos"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    with empty_bucket(endpoint, BUCKET, monkeypatch) as client:
        yield client


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
    return DataParams(source=source, checksum=None, image_size=8, channels=3, num_classes=2, test_fraction=0.25, seed=0)


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
    scratch = tmp_path / "scratch"
    from_s3 = pack(open_source(params(URI), tmp_path, raw, scratch), params(URI), tmp_path / "one", scratch)
    local = params(str(photos))
    from_folder = pack(open_source(local, tmp_path, raw, scratch), local, tmp_path / "two", scratch)
    assert from_s3 == from_folder
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(fetching.fetch(URI + "/", raw)) == contents(photos)


def test_listing_of_many_pages_is_complete(
    client: S3Client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(client, photos)
    monkeypatch.setattr(listing, "_PAGE", 3)
    assert contents(fetching.fetch(URI, tmp_path / "raw")) == contents(photos)


def test_second_run_downloads_only_what_changed(
    client: S3Client, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(client, photos)
    raw = tmp_path / "raw"
    directory = fetching.fetch(URI, raw)
    times = {path: path.stat().st_mtime_ns for path in directory.rglob("*.png")}
    fetching.fetch(URI, raw)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.png")} == times

    Image.new("RGB", (12, 9), "red").save(photos / "ant" / "0 a.png")
    (photos / "bee" / "7 a.png").unlink()
    upload(client, photos)
    client.delete_object(Bucket=BUCKET, Key="sets/photos/bee/7 a.png")
    (directory / "ant" / "1 a.png").write_bytes(b"damaged")
    fetching.fetch(URI, raw)
    assert fetched(caplog) == ["16 to fetch", "0 to fetch", "2 to fetch"]
    assert contents(directory) == contents(photos)
    index = json.loads(directory.with_name(directory.name + ".json").read_text())
    assert list(index) == sorted(contents(photos))
    md5 = hashlib.md5((photos / "ant" / "0 a.png").read_bytes()).hexdigest()
    assert index["ant/0 a.png"] == {"etag": md5, "size": (photos / "ant" / "0 a.png").stat().st_size, "version": None}


def test_interrupted_download_is_not_taken_as_whole(
    client: S3Client, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(client, photos)
    raw, writes, write = tmp_path / "raw", 0, os.pwrite

    def breaks_off(descriptor: int, content: bytes, position: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 5:
            write(descriptor, content[:10], position)
            raise KeyboardInterrupt
        return write(descriptor, content, position)

    monkeypatch.setattr(fetching, "AT_ONCE", 1)
    monkeypatch.setattr(os, "pwrite", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        fetching.fetch(URI, raw)
    monkeypatch.undo()
    directory = next(path for path in raw.rglob("*") if (path / "ant").is_dir())
    assert set(contents(directory).items()) < set(contents(photos).items())  # nothing half, nothing temporary
    assert len(contents(raw)) == 5 + 1  # and the index


def test_carries_on_after_an_interruption(
    client: S3Client, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upload(client, photos)
    directory = fetching.fetch(URI, tmp_path / "raw")
    index_file = directory.with_name(directory.name + ".json")
    index = json.loads(index_file.read_text())
    (directory / "ant" / "0 a.png").unlink()  # recorded, gone
    del index["ant/1 a.png"]  # there, not recorded: a kill came between
    index_file.write_text(json.dumps(index))
    (directory / "ant" / ".2 a.png.abc.tmp").write_bytes(b"half")  # a kill came inside
    fetching.fetch(URI, tmp_path / "raw")
    assert fetched(caplog)[1:] == ["2 to fetch"]
    assert contents(directory) == contents(photos)


@pytest.mark.parametrize("key", ["ant/../../../escape.png", "/etc/x.png", "ant//x.png", "ant/..\\x.png", "./x.png"])
def test_key_that_would_escape_is_refused(client: S3Client, tmp_path: Path, key: str) -> None:
    entry = {"Key": f"sets/photos/{key}", "Size": 1, "ETag": '"x"'}

    class Listing:
        def get_paginator(self, _: str) -> "Listing":
            return self

        def paginate(self, **_: object) -> list[dict[str, object]]:
            return [{"Contents": [entry]}]

    with pytest.raises(InputError, match="cannot be a file below the folder"):
        listing.list_prefix(Listing(), URI, BUCKET, "sets/photos")  # type: ignore[arg-type]


def test_object_that_is_also_a_directory_is_refused(client: S3Client, tmp_path: Path) -> None:
    for key in ("sets/photos/a.png", "sets/photos/a.png/b.png"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    with pytest.raises(InputError, match="is also the directory of others"):
        fetching.fetch(URI, tmp_path)


def test_refusals_say_why(client: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    def refused(uri: str) -> str:
        with pytest.raises(InputError) as error:
            fetching.fetch(uri, tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    without_pauses(monkeypatch)
    assert refused("s3://no-such-bucket/x") == f"s3://no-such-bucket/x: no bucket 'no-such-bucket' at {endpoint}"
    assert refused(URI).startswith(f"{URI}: no images or data below this prefix")
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


def test_one_object_comes_as_a_file_with_its_suffix(client: S3Client, tmp_path: Path) -> None:
    client.put_object(Bucket=BUCKET, Key="sets/cifar-10-binary.tar.gz", Body=b"archive")
    client.put_object(Bucket=BUCKET, Key="sets/cifar-10-binary.tar.gz.txt", Body=b"another that begins alike")
    path = fetching.fetch(f"s3://{BUCKET}/sets/cifar-10-binary.tar.gz", tmp_path)
    assert path.name.endswith("cifar-10-binary.tar.gz")
    assert path.read_bytes() == b"archive"
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    client.put_object(Bucket=BUCKET, Key="sets/cifar-10-binary.tar.gz", Body=b"new one")
    assert fetching.fetch(f"s3://{BUCKET}/sets/cifar-10-binary.tar.gz", tmp_path).read_bytes() == b"new one"


def test_data_files_come_with_the_images_and_the_rest_stays(client: S3Client, tmp_path: Path) -> None:
    wanted = ["dataset.json", "a/0.png", "data/x.parquet", "train_data_batch_1.npz", "data_batch_1.bin", "meta.txt"]
    for name in [*wanted, ".hidden/0.png", ".cache.json", "notes.md", "data_batch_1.pkl", "setup.py", "a/Thumbs.db"]:
        client.put_object(Bucket=BUCKET, Key=f"sets/{name}", Body=b"x")
    assert sorted(contents(fetching.fetch(f"s3://{BUCKET}/sets", tmp_path))) == sorted(wanted)


def test_version_of_each_object_is_recorded_where_the_bucket_keeps_versions(client: S3Client, tmp_path: Path) -> None:
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    version = client.put_object(Bucket=BUCKET, Key="sets/a/0.png", Body=b"x")["VersionId"]
    directory = fetching.fetch(f"s3://{BUCKET}/sets", tmp_path)
    index = directory.with_name(directory.name + ".json")
    assert json.loads(index.read_text())["a/0.png"]["version"] == version
    before = index.read_bytes()
    fetching.fetch(f"s3://{BUCKET}/sets", tmp_path)
    assert index.read_bytes() == before
    again = fetching.fetch(f"s3://{BUCKET}/sets", tmp_path / "another machine")
    assert again.with_name(again.name + ".json").read_bytes() == before


def test_sync_counts_what_it_did(client: S3Client, photos: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(Path(__file__).parents[2] / "params", project / "params")
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    (project / "params.yaml").write_text(re.sub(r"(?m)^  source: .*$", f"  source: {URI}", text, count=1))
    workspace = Workspace(project)
    upload(client, photos)
    size = sum(path.stat().st_size for path in photos.rglob("*.png"))
    found = sync(workspace)
    assert (found.uri, found.files, found.bytes) == (URI, 16, size)
    assert (found.new, found.changed, found.removed) == (16, 0, 0)
    assert contents(found.path) == contents(photos)
    assert found.path.is_relative_to(workspace.raw)
    client.put_object(Bucket=BUCKET, Key="sets/photos/ant/0 a.png", Body=b"changed")
    client.put_object(Bucket=BUCKET, Key="sets/photos/ant/new.png", Body=b"new")
    for i in (1, 2, 3):
        client.delete_object(Bucket=BUCKET, Key=f"sets/photos/ant/{i} a.png")
    found = sync(workspace)
    assert (found.files, found.new, found.changed, found.removed) == (14, 1, 1, 3)
    (project / "params.yaml").write_text(re.sub(r"(?m)^  source: .*$", "  source: digits", text, count=1))
    with pytest.raises(InputError, match=r"params\.yaml: data\.source = 'digits': nothing to sync"):
        sync(workspace)


def test_folder_and_file_replace_each_other(client: S3Client, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/sets/x.zip"
    client.put_object(Bucket=BUCKET, Key="sets/x.zip/a/0.png", Body=b"x")
    assert fetching.fetch(uri, tmp_path).is_dir()
    client.put_object(Bucket=BUCKET, Key="sets/x.zip", Body=b"zip")
    assert fetching.fetch(uri, tmp_path).read_bytes() == b"zip"
    client.delete_object(Bucket=BUCKET, Key="sets/x.zip")
    assert sorted(contents(fetching.fetch(uri, tmp_path))) == ["a/0.png"]


def test_link_in_the_folder_is_not_followed(client: S3Client, photos: Path, tmp_path: Path) -> None:
    upload(client, photos)
    directory = fetching.fetch(URI, tmp_path / "raw")
    outside = tmp_path / "outside"
    shutil.move(directory / "ant", outside)
    (directory / "ant").symlink_to(outside)
    (outside / "0 a.png").write_bytes(b"mine")
    (outside / "mine.txt").write_bytes(b"mine")
    assert contents(fetching.fetch(URI, tmp_path / "raw")) == contents(photos)
    assert not (directory / "ant").is_symlink()
    assert (outside / "0 a.png").read_bytes() == (outside / "mine.txt").read_bytes() == b"mine"


def test_second_process_does_not_fetch_into_the_same_place(client: S3Client, photos: Path, tmp_path: Path) -> None:
    upload(client, photos)
    directory = fetching.fetch(URI, tmp_path).parent
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another process is fetching"):
            fetching.fetch(URI, tmp_path)
    finally:
        os.close(lock)
    fetching.fetch(URI, tmp_path)
