"""Fetches raw data from S3, once. Endpoint, region and credentials come from the usual AWS environment."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.data.s3 import ranges
from darkroom.data.s3.client import connected, parse_uri
from darkroom.data.s3.download import AT_ONCE, ATTEMPTS, Got, download_small, free_bytes, in_threads
from darkroom.data.s3.index import Index
from darkroom.data.s3.listing import Remote, find_object, list_prefix, local_name
from darkroom.data.s3.ranges import download_large, part_files
from darkroom.errors import InputError
from darkroom.files import alone_in
from darkroom.progress import progress

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

_MB = 1_000_000


@dataclass(frozen=True)
class Synced:
    """What a fetch found and did."""

    uri: str
    path: Path  # the folder of the prefix, or the file of the object
    files: int
    bytes: int
    new: int  # files
    changed: int  # files; those that were damaged here count as well
    removed: int  # files


def fetch(uri: str, raw: Path) -> Path:
    """`update`'s folder or file."""
    return update(uri, raw).path


def update(uri: str, raw: Path) -> Synced:
    """Bring the object `s3://bucket/key`, or the images and data below `s3://bucket/prefix`, to `raw`.

    Afterwards there is exactly what is listed, and an index beside it that gives the size, ETag and version of each
    object. A file appears only when it is whole and verified; those that the index records as the listing has them are
    not downloaded again, so an interrupted fetch carries on. Raises InputError, naming the URI, the object or the file,
    for whatever keeps the data from being fetched.
    """
    bucket, prefix = parse_uri(uri, "params.yaml: data.source")
    path = raw / "s3" / bucket / local_name(prefix)
    try:
        with connected(uri, bucket, "s3:ListBucket and s3:GetObject", at_once=AT_ONCE, attempts=ATTEMPTS) as client:
            single = find_object(client, bucket, prefix) if prefix and not uri.endswith("/") else None
            remotes = [single] if single else list_prefix(client, uri, bucket, prefix)
            busy = InputError(f"{uri}: another process is fetching into {path.parent}; wait until it is done")
            with alone_in(path.parent, busy):
                return _bring(client, uri, bucket, remotes, path, single is not None)
    except OSError as error:
        raise InputError(f"{uri}: {error.filename or path}: {error.strerror or error}") from None


def _bring(client: "S3Client", uri: str, bucket: str, remotes: list[Remote], path: Path, is_file: bool) -> Synced:
    """Make `path` what is listed."""
    folder = path.parent if is_file else path
    index = Index(path)
    before = index.entries
    _make_way(path, is_file, remotes)
    wanted = [r for r in remotes if not (index.has(r) and _has_size(folder / r.path, r.size))]
    log.info("%s: %s objects, %s to fetch", uri, f"{len(remotes):,}", f"{len(wanted):,}")
    _refuse_full_disk(uri, wanted, folder)
    whole = {remote.path for remote in remotes} - {remote.path for remote in wanted}
    index.entries = {name: entry for name, entry in before.items() if name in whole}
    unverified = 0
    try:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for got in _download_all(client, bucket, wanted, folder, threads):
                index.add(got.remote, got.version)
                unverified += not got.verified
    finally:
        index.close()
    if unverified:
        log.info("%s: %s objects have no checksum that can be compared; their sizes were", uri, f"{unverified:,}")
    new = sum(remote.path not in before for remote in wanted)
    return Synced(
        uri=uri,
        path=path,
        files=len(remotes),
        bytes=sum(remote.size for remote in remotes),
        new=new,
        changed=len(wanted) - new,
        removed=len(before.keys() - {remote.path for remote in remotes}),
    )


def _download_all(
    client: "S3Client", bucket: str, remotes: list[Remote], folder: Path, threads: Executor
) -> Iterator[Got]:
    """Each object when its file is whole: the small ones side by side, then the large ones in turn."""
    if not remotes:
        return
    start, done = time.monotonic(), 0
    total = sum(remote.size for remote in remotes)
    with progress("fetch", max(1, total // _MB), "MB") as show:

        def advance(size: int) -> None:
            nonlocal done
            done = min(total, done + size)  # what came damaged comes again
            rate = done / _MB / max(time.monotonic() - start, 1e-3)
            show(max(1, total // _MB) if done == total else done // _MB, f"{rate:.1f} MB/s")

        for got in in_threads(
            threads, lambda r: download_small(client, bucket, r, folder / r.path), filterfalse(_is_large, remotes)
        ):
            yield got
            advance(got.remote.size)
        for remote in filter(_is_large, remotes):
            yield download_large(client, bucket, remote, folder / remote.path, threads, advance)


def _is_large(remote: Remote) -> bool:
    return remote.size > ranges.RANGED_ABOVE


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _refuse_full_disk(uri: str, wanted: list[Remote], folder: Path) -> None:
    needed = sum(remote.size for remote in wanted)
    for remote in wanted:
        part, _ = part_files(folder / remote.path)
        if _is_large(remote) and part.is_file():
            needed -= min(remote.size, part.stat().st_blocks * 512)  # the rest of an earlier fetch
    free = free_bytes(folder / "any")
    if needed > free:
        raise InputError(f"{uri}: {needed:,} bytes to fetch, but {folder} has {free:,} bytes free")


def _make_way(path: Path, is_file: bool, remotes: list[Remote]) -> None:
    """Delete what is no longer in the bucket, and temporary files of a killed fetch that nothing can carry on."""
    if is_file:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        parts = [] if any(map(_is_large, remotes)) else part_files(path)
        for stale in [*path.parent.glob(f".{path.name}.{'?' * 8}.tmp"), *parts]:
            stale.unlink(missing_ok=True)
        return
    if path.is_symlink() or path.is_file():
        path.unlink()
    keep = {remote.path for remote in remotes}
    keep |= {file.as_posix() for remote in filter(_is_large, remotes) for file in part_files(Path(remote.path))}
    for directory, directories, files in os.walk(path, topdown=False):
        links = [name for name in directories if Path(directory, name).is_symlink()]
        for name in [*files, *links]:
            file = Path(directory, name)
            if file.relative_to(path).as_posix() not in keep or name in links:
                file.unlink()
        if not any(os.scandir(directory)):
            Path(directory).rmdir()
