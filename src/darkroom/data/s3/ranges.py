"""A large object in ranges, several at a time, into one file that survives a kill."""

import os
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.data.s3.checksums import Damaged
from darkroom.data.s3.download import Got, again_if_damaged, copy_range, explained, got_from, in_threads
from darkroom.data.s3.listing import Remote
from darkroom.files import read_json, sync_directory, write_json

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RANGED_ABOVE = 64 << 20  # bytes; what is larger comes in ranges
RANGE = 16 << 20  # bytes: what a kill can lose, times the number at once


def part_files(destination: Path) -> tuple[Path, Path]:
    """Where a large object's bytes gather, and the record of the ranges that are there."""
    part = destination.with_name(f".{destination.name}.part")
    return part, part.with_name(f"{part.name}.json")


def download_large(
    client: "S3Client",
    bucket: str,
    remote: Remote,
    destination: Path,
    threads: Executor,
    advance: Callable[[int], None],
) -> Got:
    """Fetch in ranges, several at a time, into a file beside `destination`; after a kill the next call carries on.

    `advance` is told the bytes of each range that is there. Raises as `download_small` does.
    """
    part, record = part_files(destination)

    def once() -> Got:
        answer = client.head_object(Bucket=bucket, Key=remote.key, IfMatch=f'"{remote.etag}"', ChecksumMode="ENABLED")
        _fetch_ranges(client, bucket, remote, destination, threads, advance)
        try:
            got = got_from(client, bucket, remote, part, answer)
        except Damaged:
            _forget(part, record)
            raise
        part.replace(destination)
        sync_directory(destination.parent)
        record.unlink()
        return got

    with explained(bucket, remote, destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        return again_if_damaged(once, bucket, remote)


def _fetch_ranges(
    client: "S3Client",
    bucket: str,
    remote: Remote,
    destination: Path,
    threads: Executor,
    advance: Callable[[int], None],
) -> None:
    part, record = part_files(destination)
    expected = {"etag": remote.etag, "size": remote.size, "range": RANGE}
    finished = _finished(part, record, expected)
    starts = [start for start in range(0, remote.size, RANGE) if start not in finished]
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def fetch(start: int) -> int:
        copy_range(client, bucket, remote, descriptor, start, min(start + RANGE, remote.size))
        return start

    try:
        try:
            _allocate(descriptor, remote.size)
        except OSError:
            _forget(part, record)
            raise
        advance(sum(min(RANGE, remote.size - start) for start in finished))
        with closing(in_threads(threads, fetch, starts)) as running:
            for start in running:
                os.fsync(descriptor)  # what the record promises outlives the machine
                finished.add(start)
                write_json(record, {**expected, "finished": sorted(finished)})
                advance(min(RANGE, remote.size - start))
    finally:
        os.close(descriptor)


def _finished(part: Path, record: Path, expected: dict[str, Any]) -> set[int]:
    """Starts of the ranges that an earlier call left, if they are of the same object; else both files are removed."""
    try:
        found = read_json(record)
        starts = {start for start in found.pop("finished") if start in range(0, expected["size"], RANGE)}
        if found == expected and part.stat().st_size == expected["size"]:
            return starts
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        pass
    _forget(part, record)
    return set()


def _forget(part: Path, record: Path) -> None:
    record.unlink(missing_ok=True)  # first: without it the other is nothing
    part.unlink(missing_ok=True)


def _allocate(descriptor: int, size: int) -> None:
    """Take the room now, so that a full disk shows before hours of download."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
