"""One object to one file, whole, verified, or not at all."""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any, TypeVar

from darkroom.data.s3.checksums import Damaged, stated, verify
from darkroom.data.s3.listing import Remote
from darkroom.errors import InputError
from darkroom.files import replacing

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

AT_ONCE = 16  # requests
# Per request, and per body that breaks off. botocore's budget for retries, 500 tokens of which each takes 5, is enough
# for all of AT_ONCE to use theirs up.
ATTEMPTS = 6
_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before a body is asked for again; doubles
_CHUNK = 1 << 20

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Got:
    """An object whose file is whole."""

    remote: Remote
    version: str | None  # S3's version id, where the bucket keeps versions
    verified: bool  # by a checksum; otherwise only its size was compared


def free_bytes(path: Path) -> int:
    """Room on the disk on which `path` is or will be."""
    return disk_usage(next(directory for directory in path.absolute().parents if directory.exists())).free


def in_threads(threads: Executor, work: Callable[[T], U], items: Iterable[T]) -> Generator[U, None, None]:
    """Results of `work` in the order in which they end. The first failure stops the rest; few wait at any time.

    When it is done, or closed, no work of it is running.
    """
    running: set[Future[U]] = set()
    remaining = iter(items)
    try:
        while True:
            for item in islice(remaining, 2 * AT_ONCE - len(running)):
                running.add(threads.submit(work, item))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        wait([future for future in running if not future.cancel()])


def download_small(client: "S3Client", bucket: str, remote: Remote, destination: Path) -> Got:
    """Fetch with one request. Raises InputError for an object that changed, vanished or came damaged twice, and for a
    disk that cannot take it."""

    def once() -> Got:
        with replacing(destination) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY)
            try:
                answer = copy_range(client, bucket, remote, descriptor, 0, remote.size)
            finally:
                os.close(descriptor)
            return got_from(client, bucket, remote, temporary, answer)

    with explained(bucket, remote, destination):
        return again_if_damaged(once, bucket, remote)


def copy_range(
    client: "S3Client", bucket: str, remote: Remote, descriptor: int, start: int, stop: int
) -> dict[str, Any]:
    """Write bytes start to stop - 1 of the object to the file; returns the first answer.

    A body that breaks off is asked for again from there.
    """
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

    first: dict[str, Any] = {}
    position = start
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
        answer = _ask(client, bucket, remote, position, stop)
        first = first or answer
        try:
            with closing(answer["Body"]) as body:  # in a with statement of its own it would be the raw stream
                while chunk := body.read(_CHUNK):
                    if position + len(chunk) > stop:
                        raise Damaged(f"more than the {stop - start:,} bytes that were asked for")
                    _write(descriptor, chunk, position)
                    position += len(chunk)
        except FlexibleChecksumError as error:
            raise Damaged(str(error)) from None
        except (HTTPClientError, IncompleteReadError):
            pass  # the connection broke off inside the body; botocore does not ask again
        if position == stop:
            return first
    raise InputError(
        f"s3://{bucket}/{remote.key}: {position - start:,} of {stop - start:,} bytes received; "
        f"the connection broke off {ATTEMPTS} times"
    )


def _ask(client: "S3Client", bucket: str, remote: Remote, start: int, stop: int) -> dict[str, Any]:
    # IfMatch: an object that was overwritten since it was listed is an error, not a mixture.
    match = f'"{remote.etag}"'
    if (start, stop) == (0, remote.size):
        return dict(client.get_object(Bucket=bucket, Key=remote.key, IfMatch=match, ChecksumMode="ENABLED"))
    wanted = f"bytes={start}-{stop - 1}"
    answer: dict[str, Any] = dict(client.get_object(Bucket=bucket, Key=remote.key, IfMatch=match, Range=wanted))
    if answer.get("ContentRange") != f"bytes {start}-{stop - 1}/{remote.size}":
        answer["Body"].close()
        raise InputError(f"s3://{bucket}/{remote.key}: asked for {wanted}, the server gave something else")
    return answer


def _write(descriptor: int, chunk: bytes, position: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def got_from(client: "S3Client", bucket: str, remote: Remote, file: Path, answer: Any) -> Got:
    """The whole object in `file`, compared with what `answer` (to GetObject or HeadObject) states. Raises Damaged."""

    def part_size(number: int) -> int:
        # Without IfMatch: some servers compare it with the part's own ETag.
        return client.head_object(Bucket=bucket, Key=remote.key, PartNumber=number)["ContentLength"]

    verified = verify(file, stated(answer, bucket), part_size)
    version = answer.get("VersionId")
    return Got(remote, None if version == "null" else version, verified)


def again_if_damaged(once: Callable[[], Got], bucket: str, remote: Remote) -> Got:
    """`once()`, repeated when the bytes are not the object's. Raises InputError when they are not again."""
    try:
        return once()
    except Damaged:
        pass
    try:
        return once()
    except Damaged as error:
        raise InputError(f"s3://{bucket}/{remote.key}: damaged on the way, twice: {error}") from None


@contextmanager
def explained(bucket: str, remote: Remote, destination: Path) -> Iterator[None]:
    """Errors that concern this object or this file as InputErrors; the rest is left to `connected`."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        happened = {"PreconditionFailed": "changed", "412": "changed", "NoSuchKey": "deleted", "404": "deleted"}
        if code not in happened:
            raise
        raise InputError(f"s3://{bucket}/{remote.key}: {happened[code]} while it was fetched; run again") from None
    except OSError as error:
        free = free_bytes(destination)
        raise InputError(
            f"{destination}: cannot be written: {error.strerror}; {remote.size:,} bytes needed, {free:,} free"
        ) from None
