"""Large objects from S3: parallel ranges, carried on after a kill, and compared with what the server states."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from mypy_boto3_s3 import S3Client

from darkroom.data.s3 import checksums, download, fetching, ranges
from darkroom.errors import InputError
from tests.s3 import Fault, Proxy, Request, empty_bucket, faulty, first, server, without_pauses

BUCKET = "darkroom-large"
URI = f"s3://{BUCKET}/archive.zip"
MIB = 1 << 20
CONTENT = os.urandom(10 * MIB + 12_345)
RANGES = 11

# What a process that will be killed runs.
FETCH = f"""
import sys
from pathlib import Path
from darkroom.data.s3 import download, fetching, ranges
ranges.RANGED_ABOVE, ranges.RANGE = {2 * MIB}, {MIB}
fetching.fetch("{URI}", Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    with empty_bucket(endpoint, BUCKET, monkeypatch) as client:
        yield client


@pytest.fixture
def proxy(client: S3Client, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A small number of bytes is large here."""
    without_pauses(monkeypatch)
    monkeypatch.setattr(ranges, "RANGED_ABOVE", 2 * MIB)
    monkeypatch.setattr(ranges, "RANGE", MIB)
    client.put_object(Bucket=BUCKET, Key="archive.zip", Body=CONTENT)
    with faulty(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def names(raw: Path) -> list[str]:
    return sorted(path.name for path in (raw / "s3" / BUCKET).iterdir())


def fetched(proxy: Proxy) -> list[int]:
    """Number of the range of each request for content."""
    return [int(r.range.removeprefix("bytes=").split("-")[0]) // MIB for r in proxy.gets("archive.zip") if r.range]


def upload_in_parts(client: S3Client, key: str, parts: list[bytes], **options: str) -> None:
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key, **options)["UploadId"]  # type: ignore[arg-type]
    done = []
    for number, content in enumerate(parts, start=1):
        etag = client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=content)["ETag"]
        done.append({"ETag": etag, "PartNumber": number})
    client.complete_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": done})  # type: ignore[typeddict-item]


def test_large_object_comes_in_parallel_ranges(proxy: Proxy, tmp_path: Path) -> None:
    together, lock, most = 0, threading.Lock(), 0

    def count(request: Request) -> None:
        nonlocal together, most
        if request.range:
            with lock:
                together += 1
                most = max(most, together)
            time.sleep(0.2)
            with lock:
                together -= 1

    proxy.fault = count
    assert fetching.fetch(URI, tmp_path).read_bytes() == CONTENT
    assert sorted(fetched(proxy)) == list(range(RANGES))
    assert most > 4
    assert names(tmp_path) == ["archive.zip", "archive.zip.json"]
    fetching.fetch(URI, tmp_path)
    assert len(fetched(proxy)) == RANGES


def test_large_objects_below_a_prefix_come_beside_small_ones(proxy: Proxy, client: S3Client, tmp_path: Path) -> None:
    client.put_object(Bucket=BUCKET, Key="set/data/train.parquet", Body=CONTENT)
    client.put_object(Bucket=BUCKET, Key="set/data/test.parquet", Body=b"small")
    directory = fetching.fetch(f"s3://{BUCKET}/set", tmp_path)
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}
    assert found == {"data/train.parquet": CONTENT, "data/test.parquet": b"small"}


def test_killed_fetch_is_carried_on(proxy: Proxy, tmp_path: Path) -> None:
    """A few ranges arrive, the rest hangs, the process is killed; the next fetches the rest only."""
    hang = threading.Event()

    def fault(request: Request) -> None:
        if request.range and int(request.range[6:].split("-")[0]) >= 4 * MIB:
            hang.wait(60)

    proxy.fault = fault
    process = subprocess.Popen([sys.executable, "-c", FETCH, str(tmp_path)], stdout=subprocess.DEVNULL)
    record = tmp_path / "s3" / BUCKET / ".archive.zip.part.json"
    try:
        deadline = time.monotonic() + 60
        while not record.exists() or len(json.loads(record.read_text())["finished"]) < 4:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "archive.zip" not in names(tmp_path)
    proxy.requests.clear()
    proxy.fault = lambda _: None
    hang.set()
    assert fetching.fetch(URI, tmp_path).read_bytes() == CONTENT
    assert sorted(fetched(proxy)) == list(range(4, RANGES))
    assert names(tmp_path) == ["archive.zip", "archive.zip.json"]


def break_off(proxy: Proxy, raw: Path) -> None:
    """A fetch that fails when some ranges are here."""
    _, record = ranges.part_files(raw / "s3" / BUCKET / "archive.zip")

    def fault(request: Request) -> Fault | None:
        if not request.range or not request.range.startswith(f"bytes={5 * MIB}"):
            return None
        deadline = time.monotonic() + 20
        while not record.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return Fault(403, "AccessDenied")

    proxy.fault = fault
    with pytest.raises(InputError, match="refuses these credentials"):
        fetching.fetch(URI, raw)


@pytest.mark.parametrize("harm", ["new object", "record cut short", "part gone", "part cut short"])
def test_what_is_left_of_another_object_is_not_used(proxy: Proxy, client: S3Client, tmp_path: Path, harm: str) -> None:
    break_off(proxy, tmp_path)
    part, record = ranges.part_files(tmp_path / "s3" / BUCKET / "archive.zip")
    assert json.loads(record.read_text())["finished"]
    proxy.fault, expected = lambda _: None, CONTENT
    if harm == "new object":
        expected = CONTENT[::-1]
        client.put_object(Bucket=BUCKET, Key="archive.zip", Body=expected)
    elif harm == "record cut short":
        record.write_bytes(record.read_bytes()[:-5])
    elif harm == "part gone":
        part.unlink()
    else:
        os.truncate(part, 100)
    proxy.requests.clear()
    assert fetching.fetch(URI, tmp_path).read_bytes() == expected
    assert sorted(fetched(proxy)) == list(range(RANGES))
    assert names(tmp_path) == ["archive.zip", "archive.zip.json"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, "SlowDown"),
        Fault(500, "InternalError"),
        Fault(reset=True),
        Fault(keep=1000),
        Fault(keep=1000, reset=True),
    ],
    ids=repr,
)
def test_ranges_survive_faults_that_pass(proxy: Proxy, tmp_path: Path, fault: Fault) -> None:
    proxy.fault = first(4, fault, name="archive.zip")
    assert fetching.fetch(URI, tmp_path).read_bytes() == CONTENT


def test_object_that_is_overwritten_between_ranges_is_refused(proxy: Proxy, client: S3Client, tmp_path: Path) -> None:
    def overwrite(request: Request) -> None:
        if request.range and request.range.startswith(f"bytes={7 * MIB}"):
            client.put_object(Bucket=BUCKET, Key="archive.zip", Body=CONTENT[::-1])

    proxy.fault = overwrite
    with pytest.raises(InputError, match=rf"^{URI}: changed while it was fetched; run again$"):
        fetching.fetch(URI, tmp_path)
    assert "archive.zip" not in names(tmp_path)
    proxy.fault = lambda _: None
    assert fetching.fetch(URI, tmp_path).read_bytes() == CONTENT[::-1]


def test_object_that_is_deleted_before_its_ranges_is_refused(proxy: Proxy, client: S3Client, tmp_path: Path) -> None:
    def delete(request: Request) -> None:
        if request.method == "HEAD":
            client.delete_object(Bucket=BUCKET, Key="archive.zip")

    proxy.fault = delete
    with pytest.raises(InputError, match=rf"^{URI}: deleted while it was fetched; run again$"):
        fetching.fetch(URI, tmp_path)
    assert "archive.zip" not in names(tmp_path)


def test_server_that_ignores_ranges_is_refused(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = lambda request: Fault(200, body=b"x" * MIB) if request.range else None
    with pytest.raises(InputError, match="the server gave something else"):
        fetching.fetch(URI, tmp_path)
    assert "archive.zip" not in names(tmp_path)


def test_damage_in_a_range_is_fetched_once_more_and_refused_the_second_time(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = first(1, Fault(flip=5), name="archive.zip")
    assert fetching.fetch(URI, tmp_path / "once").read_bytes() == CONTENT
    assert len(fetched(proxy)) == 2 * RANGES
    proxy.fault = lambda r: Fault(flip=5) if r.range and r.range.startswith(f"bytes={7 * MIB}") else None
    with pytest.raises(InputError, match=rf"^{URI}: damaged on the way, twice: CRC32 of what came is [0-9a-f]{{8}}, "):
        fetching.fetch(URI, tmp_path / "twice")
    assert names(tmp_path / "twice") == ["archive.zip.json"]
    assert json.loads((tmp_path / "twice" / "s3" / BUCKET / "archive.zip.json").read_text()) == {}


@pytest.mark.parametrize("sizes", [[5, 5, 1], [11], [5, 6], [6, 5]], ids=str)
def test_upload_in_parts_is_verified_by_its_etag(
    proxy: Proxy, client: S3Client, tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    plain = boto3.client("s3")
    starts = [sum(sizes[:i]) * MIB for i in range(len(sizes))]
    parts = [CONTENT[start : start + size * MIB] for start, size in zip(starts, sizes, strict=True)]
    assert b"".join(parts) == CONTENT
    upload_in_parts(plain, "archive.zip", parts)
    stated = checksums.stated(client.head_object(Bucket=BUCKET, Key="archive.zip", ChecksumMode="ENABLED"), BUCKET)
    oracle = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).digest()
    assert stated == checksums.Stated("ETag", "MD5", oracle, len(sizes))

    (remote,) = [fetching.find_object(client, BUCKET, "archive.zip")]
    assert remote is not None
    with ThreadPoolExecutor(4) as threads:
        got = ranges.download_large(client, BUCKET, remote, tmp_path / "file", threads, lambda _: None)
    assert got.verified
    assert (tmp_path / "file").read_bytes() == CONTENT
    proxy.fault = lambda r: Fault(flip=5) if r.range and r.range.startswith(f"bytes={7 * MIB}") else None
    with pytest.raises(InputError, match=r"ETag of what came is [0-9a-f]{32}, the server states " + oracle.hex()):
        fetching.fetch(URI, tmp_path)


def test_only_the_size_is_compared_where_the_etag_is_no_digest(
    proxy: Proxy, client: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    boto3.client("s3").put_object(Bucket=BUCKET, Key="archive.zip", Body=CONTENT, ServerSideEncryption="aws:kms")
    caplog.set_level("INFO")
    assert fetching.fetch(URI, tmp_path).read_bytes() == CONTENT
    assert f"{URI}: 1 objects have no checksum that can be compared; their sizes were" in caplog.text


def test_room_is_taken_before_the_first_byte(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        InputError, match=rf"archive\.zip: cannot be written: No space left on device; {len(CONTENT):,}"
    ):
        fetching.fetch(URI, tmp_path)
    assert fetched(proxy) == []
    assert names(tmp_path) == ["archive.zip.json"]


def test_what_is_already_here_needs_no_room(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(proxy, tmp_path)
    proxy.fault = lambda _: None
    monkeypatch.setattr(download, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert fetching.fetch(URI, tmp_path).read_bytes() == CONTENT
