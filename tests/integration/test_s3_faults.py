"""Raw data from an S3 that misbehaves: every fault ends in the right bytes, or in one line that says why not."""

import base64
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from mypy_boto3_s3 import S3Client

from darkroom.data.s3 import fetching
from darkroom.errors import InputError
from tests.s3 import Fault, Proxy, Request, empty_bucket, faulty, first, first_of_each, server, without_pauses

BUCKET = "darkroom-faults"
URI = f"s3://{BUCKET}/set"
CONTENT = {f"a/{i}.png": os.urandom(5_000 + i) for i in range(6)}
SLOW_DOWN = Fault(503, "SlowDown")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    with empty_bucket(endpoint, BUCKET, monkeypatch) as client:
        for name, content in CONTENT.items():
            client.put_object(Bucket=BUCKET, Key=f"set/{name}", Body=content, ChecksumAlgorithm="SHA256")
        yield client


@pytest.fixture
def proxy(client: S3Client, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What the code under test takes for S3; `client` does not go through it."""
    without_pauses(monkeypatch)
    with faulty(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def files(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.png")}


def refusal(raw: Path, uri: str = URI) -> str:
    """The message; nothing but whole files is there afterwards, and no temporary ones."""
    with pytest.raises(InputError) as error:
        fetching.fetch(uri, raw)
    assert "\n" not in str(error.value)
    for path in raw.rglob("*"):
        if path.is_file() and path.suffix != ".json":
            assert path.read_bytes() in CONTENT.values(), path
    return str(error.value)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, "InternalError"),
        Fault(503, "SlowDown"),
        Fault(429, "Calm down, please"),
        Fault(reset=True),
        Fault(keep=2_000),
        Fault(keep=2_000, reset=True),
        Fault(keep=2_000, clip=True),
        Fault(keep=0),
    ],
    ids=repr,
)
def test_faults_that_pass_are_survived(proxy: Proxy, tmp_path: Path, fault: Fault) -> None:
    proxy.fault = first_of_each(4, fault, name=".png")  # an object that is damaged twice is refused
    assert files(fetching.fetch(URI, tmp_path)) == CONTENT
    assert len(proxy.gets(".png")) == len(CONTENT) + 4


def test_listing_survives_throttling(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = first(4, SLOW_DOWN, name=f"/{BUCKET}")
    assert files(fetching.fetch(URI, tmp_path)) == CONTENT


def test_what_broke_off_is_asked_for_from_there(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = first(1, Fault(keep=2_000), name="3.png")
    assert files(fetching.fetch(URI, tmp_path)) == CONTENT
    assert [request.range for request in proxy.gets("3.png")] == [None, "bytes=2000-5002"]


@pytest.mark.parametrize("fault", [Fault(500, "InternalError"), SLOW_DOWN, Fault(status=429, code="Enough")])
def test_faults_that_stay_are_one_line_after_a_few_attempts(proxy: Proxy, tmp_path: Path, fault: Fault) -> None:
    proxy.fault = first(10**6, fault, name="3.png")
    message = refusal(tmp_path)
    assert message == f"{URI}: {proxy.url} is overloaded or out of order ({fault.code}), as often as it was asked; " + (
        "try again later"
    )
    assert len(proxy.gets("3.png")) == 6


def test_body_that_always_breaks_off_is_one_line(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = first(10**6, Fault(keep=0), name="3.png")
    expected = f"s3://{BUCKET}/set/a/3.png: 0 of 5,003 bytes received; the connection broke off 6 times"
    assert refusal(tmp_path) == expected


def test_what_was_fetched_before_a_failure_is_not_fetched_again(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = first(10**6, SLOW_DOWN, name="5.png")
    refusal(tmp_path)
    proxy.requests.clear()
    proxy.fault = lambda _: None
    assert files(fetching.fetch(URI, tmp_path)) == CONTENT
    assert [request.path for request in proxy.gets(".png")] == [f"/{BUCKET}/set/a/5.png"]


def test_damaged_bytes_are_fetched_once_more(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = first(1, Fault(flip=700), name="3.png")
    assert files(fetching.fetch(URI, tmp_path)) == CONTENT
    assert Counter(request.path[-5:] for request in proxy.gets(".png"))["3.png"] == 2


def test_bytes_that_come_damaged_twice_are_refused(proxy: Proxy, client: S3Client, tmp_path: Path) -> None:
    proxy.fault = first(2, Fault(flip=700), name="3.png")
    message = refusal(tmp_path)
    assert message.startswith(f"s3://{BUCKET}/set/a/3.png: damaged on the way, twice: Expected checksum ")
    digest = base64.b64encode(hashlib.sha256(CONTENT["a/3.png"]).digest()).decode()
    damaged = CONTENT["a/3.png"][:700] + bytes([CONTENT["a/3.png"][700] ^ 255]) + CONTENT["a/3.png"][701:]
    assert digest in message
    assert base64.b64encode(hashlib.sha256(damaged).digest()).decode() in message
    assert not list(tmp_path.rglob("*3.png*"))


def test_without_a_checksum_the_etag_tells_damage(
    proxy: Proxy, client: S3Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    boto3.client("s3").put_object(Bucket=BUCKET, Key="plain/0.png", Body=CONTENT["a/0.png"])
    assert not any(
        name.startswith("Checksum")
        for name in client.head_object(Bucket=BUCKET, Key="plain/0.png", ChecksumMode="ENABLED")
    )
    proxy.fault = first(1, Fault(flip=700), name="0.png")
    assert files(fetching.fetch(f"s3://{BUCKET}/plain", tmp_path / "once")) == {"0.png": CONTENT["a/0.png"]}
    proxy.fault = first(2, Fault(flip=700), name="0.png")
    message = refusal(tmp_path / "twice", f"s3://{BUCKET}/plain")
    digest = hashlib.md5(CONTENT["a/0.png"]).hexdigest()
    assert message.startswith(f"s3://{BUCKET}/plain/0.png: damaged on the way, twice: ETag of what came is ")
    assert message.endswith(f", the server states {digest}")


def test_object_that_is_overwritten_after_the_listing_is_refused(
    proxy: Proxy, client: S3Client, tmp_path: Path
) -> None:
    def overwrite(request: Request) -> None:
        if request.path.endswith("3.png"):
            client.put_object(Bucket=BUCKET, Key="set/a/3.png", Body=b"new")

    proxy.fault = overwrite
    assert refusal(tmp_path) == f"s3://{BUCKET}/set/a/3.png: changed while it was fetched; run again"
    proxy.fault = lambda _: None
    assert files(fetching.fetch(URI, tmp_path)) == {**CONTENT, "a/3.png": b"new"}


def test_object_that_is_overwritten_in_the_middle_is_no_mixture(proxy: Proxy, client: S3Client, tmp_path: Path) -> None:
    def fault(request: Request) -> Fault | None:
        if not request.path.endswith("3.png"):
            return None
        if request.range:  # the rest
            client.put_object(Bucket=BUCKET, Key="set/a/3.png", Body=bytes(5_003))
        return Fault(keep=2_000)

    proxy.fault = fault
    assert refusal(tmp_path) == f"s3://{BUCKET}/set/a/3.png: changed while it was fetched; run again"


def test_object_that_is_deleted_after_the_listing_is_refused(proxy: Proxy, client: S3Client, tmp_path: Path) -> None:
    def delete(request: Request) -> None:
        if request.path.endswith("3.png"):
            client.delete_object(Bucket=BUCKET, Key="set/a/3.png")

    proxy.fault = delete
    assert refusal(tmp_path) == f"s3://{BUCKET}/set/a/3.png: deleted while it was fetched; run again"


@pytest.mark.parametrize(
    "fault",
    [Fault(404, body=b"<html><body>No page here</body></html>"), Fault(200, body=b"It works!")],
    ids=["404", "200"],
)
def test_endpoint_that_is_another_server_is_named(proxy: Proxy, tmp_path: Path, fault: Fault) -> None:
    proxy.fault = lambda _: fault
    expected = f"{URI}: {proxy.url} does not answer as S3 does; AWS_ENDPOINT_URL sets the endpoint"
    assert refusal(tmp_path) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_refused_credentials_are_one_line(proxy: Proxy, tmp_path: Path, code: str) -> None:
    proxy.fault = lambda _: Fault(403, code)
    message = refusal(tmp_path)
    assert message == (
        f"{URI}: {proxy.url} refuses these credentials ({code}); they need s3:ListBucket and s3:GetObject on {BUCKET!r}"
    )
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_refused_before_the_first_byte(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(map(len, CONTENT.values()))
    monkeypatch.setattr("darkroom.data.s3.download.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    message = refusal(tmp_path)
    assert message.startswith(f"{URI}: {needed:,} bytes to fetch, but ")
    assert message.endswith(f" has {needed - 1:,} bytes free")
    assert proxy.gets(".png") == []
    monkeypatch.setattr("darkroom.data.s3.download.disk_usage", lambda _: SimpleNamespace(free=needed))
    assert files(fetching.fetch(URI, tmp_path)) == CONTENT


def test_disk_that_fills_up_is_one_line(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, lock, left = os.pwrite, threading.Lock(), 12_000

    def until_full(descriptor: int, content: bytes, position: int) -> int:
        nonlocal left
        with lock:
            left -= len(content)
            if left < 0:
                raise OSError(28, "No space left on device")
        return write(descriptor, content, position)

    monkeypatch.setattr(os, "pwrite", until_full)
    message = refusal(tmp_path)
    assert ".png: cannot be written: No space left on device; 5,00" in message
    assert "bytes needed, " in message
    monkeypatch.undo()


def test_fetch_into_what_is_no_directory_is_one_line(proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(CONTENT["a/0.png"])
    assert refusal(tmp_path / "raw").endswith("Not a directory")


def test_secrets_are_in_no_message(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUNTER2HUNTER2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    caplog.set_level("INFO")
    faults = [
        Fault(status=403, code="AccessDenied"),
        SLOW_DOWN,
        Fault(reset=True),
        Fault(status=200, body=b"<", code="x"),
    ]
    for fault in faults:
        proxy.fault = lambda _, fault=fault: fault  # type: ignore[misc]
        message = refusal(tmp_path)
        assert "hunter2" not in message.lower()
        assert "?" not in message
    own = [record.getMessage().lower() for record in caplog.records if record.name.startswith("darkroom")]
    assert "hunter2" not in "".join(own)
