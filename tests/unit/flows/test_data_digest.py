"""The digest of a source: new for new data, the same for the same data, on disk and on S3."""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mypy_boto3_s3 import S3Client

from darkroom.errors import InputError
from flows import data_digest
from flows.data_digest import Look, look_at
from tests.s3 import empty_bucket, server, without_pauses


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    without_pauses(monkeypatch)
    with empty_bucket(endpoint, "images", monkeypatch) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        file = tmp_path / "data" / "raw" / "pets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return tmp_path / "data" / "raw" / "pets"


def look(folder: Path) -> Look:
    root = folder.parents[2]
    return look_at(str(folder.relative_to(root)), root, root / "hashes")


def s3(uri: str, tmp_path: Path) -> Look:
    return look_at(uri, tmp_path, tmp_path / "hashes")


def test_every_change_of_content_or_name_is_a_new_digest(folder: Path) -> None:
    digests = [look(folder).digest]
    (folder / "cats" / "1.png").write_bytes(b"cats/9.png")  # the same size
    digests.append(look(folder).digest)
    (folder / "cats" / "1.png").rename(folder / "dogs" / "2.png")
    digests.append(look(folder).digest)
    (folder / "dogs" / "2.png").unlink()
    digests.append(look(folder).digest)
    (folder / "dogs" / "3.PNG").write_bytes(b"new")
    digests.append(look(folder).digest)
    assert len(set(digests)) == 5


def test_what_no_reader_looks_at_is_no_new_data(folder: Path) -> None:
    before = look(folder)
    (folder / "README.md").write_text("about")
    (folder / ".part.png").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "1.png").write_bytes(b"x")
    after = look(folder)
    assert (after.digest, after.objects, after.bytes) == (before.digest, 3, before.bytes)


def test_a_touched_or_copied_folder_is_no_new_data(folder: Path, tmp_path: Path) -> None:
    before = look(folder)
    for file in folder.rglob("*.png"):
        os.utime(file, (1, 1))
    assert look(folder).digest == before.digest
    shutil.copytree(folder, folder.with_name("copy"))
    assert look(folder.with_name("copy")).digest == before.digest


def test_contents_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_digest, "_SETTLED_NS", -1)
    first = look(folder)
    hashed: list[Path] = []
    original = data_digest.digest_file
    monkeypatch.setattr(data_digest, "digest_file", lambda path: (hashed.append(path), original(path))[1])
    assert look(folder).digest == first.digest
    assert hashed == []
    changed = folder / "cats" / "2.png"
    times = changed.stat()
    changed.write_bytes(b"cats/9.png")
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync does
    assert look(folder).digest != first.digest
    assert hashed == [changed]


def test_a_file_that_has_just_changed_is_hashed_again(folder: Path) -> None:
    look(folder)
    assert not list((folder.parents[2] / "hashes").glob("*"))


def test_a_garbled_memory_of_hashes_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_digest, "_SETTLED_NS", -1)
    first = look(folder)
    (memory,) = (folder.parents[2] / "hashes").glob("*.json")
    memory.write_text("{")
    assert look(folder).digest == first.digest


def test_links_are_followed_and_a_circle_ends(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "3.png").write_bytes(b"3")
    (folder / "birds").symlink_to(tmp_path / "elsewhere")
    (folder / "dogs" / "circle").symlink_to(folder)
    assert look(folder).objects == 4


def test_a_removal_is_the_newest_change(folder: Path) -> None:
    hours = datetime.now(UTC) - timedelta(hours=1)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (hours.timestamp(), hours.timestamp()))
    (folder / "cats" / "1.png").unlink()
    found = look(folder)
    assert found.at - found.newest < timedelta(minutes=1)


def test_one_file_is_a_source(folder: Path) -> None:
    archive = folder.parent / "set.zip"
    archive.write_bytes(b"one")
    found = look(archive)
    assert (found.objects, found.bytes) == (1, 3)
    archive.write_bytes(b"two")
    assert look(archive).digest != found.digest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digits", "nothing to watch; expected s3://bucket/prefix or a path in data/raw"),
        ("https://example.org/data", "nothing to watch"),
        ("data/raw/absent", "no such file or folder"),
        ("data/raw/empty", "no images or data here"),
        ("elsewhere", "only what lies below .*/data/raw makes DVC prepare data again"),
        ("data/raw/../elsewhere", "only what lies below"),
    ],
)
def test_a_source_that_cannot_be_watched_says_what_would_be_right(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "raw" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match=message) as caught:
        look_at(source, tmp_path, tmp_path / "hashes")
    assert "\n" not in str(caught.value)


def test_objects_put_again_are_no_new_data_and_new_ones_are(bucket: S3Client, tmp_path: Path) -> None:
    def put(name: str, content: bytes) -> None:
        bucket.put_object(Bucket="images", Key=f"set/{name}", Body=content)

    put("a/1.png", b"one")
    put("b/1.png", b"two")
    before = s3("s3://images/set", tmp_path)
    assert (before.objects, before.bytes) == (2, 6)
    assert abs(before.at - before.newest) < timedelta(minutes=1)
    put("a/1.png", b"one")
    put(".hidden/1.png", b"x")
    put("README.md", b"x")
    bucket.put_object(Bucket="images", Key="settings/1.png", Body=b"x")
    assert s3("s3://images/set/", tmp_path).digest == before.digest
    put("a/1.png", b"three")
    assert s3("s3://images/set", tmp_path).digest != before.digest
    put("a/1.png", b"one")
    assert s3("s3://images/set", tmp_path).digest == before.digest
    bucket.delete_object(Bucket="images", Key="set/b/1.png")
    assert s3("s3://images/set", tmp_path).objects == 1


def test_more_objects_than_one_answer_holds(bucket: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_digest, "_PAGE", 3)
    for i in range(10):
        bucket.put_object(Bucket="images", Key=f"set/{i}.png", Body=b"x")
    before = s3("s3://images/set", tmp_path)
    assert before.objects == 10
    bucket.put_object(Bucket="images", Key="set/9.png", Body=b"y")  # the last one
    assert s3("s3://images/set", tmp_path).digest != before.digest


def test_one_object_is_a_source(bucket: S3Client, tmp_path: Path) -> None:
    bucket.put_object(Bucket="images", Key="set.zip", Body=b"one")
    bucket.put_object(Bucket="images", Key="set.zip.txt", Body=b"other")
    found = s3("s3://images/set.zip", tmp_path)
    assert (found.objects, found.bytes) == (1, 3)


def test_a_bucket_prefix_or_key_that_is_missing_says_what_to_do(
    bucket: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no bucket 'absent'"):
        s3("s3://absent/set", tmp_path)
    with pytest.raises(InputError, match="s3://images/set: no images or data here"):
        s3("s3://images/set", tmp_path)
    with pytest.raises(InputError, match="expected s3://bucket/prefix"):
        s3("s3://Images/set", tmp_path)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(InputError, match="no AWS credentials"):
        s3("s3://images/set", tmp_path)
