"""Fetches raw images from S3, once. Endpoint, region and credentials come from the usual AWS environment."""

import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from darkroom.data.images import SUFFIXES
from darkroom.data.s3_client import ATTEMPTS, connected, parse_uri
from darkroom.errors import InputError
from darkroom.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

_AT_ONCE = 16  # downloads
_PAGE = 1000  # objects per answer of the listing, S3's maximum
_SAVE_EVERY = 500  # downloads between two writes of the index: what a kill can lose
_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Remote:
    """An object of the listing."""

    path: str  # relative to the prefix
    key: str
    size: int  # bytes
    etag: str  # changes with the content

    @property
    def version(self) -> list[int | str]:
        return [self.size, self.etag]


def fetch(uri: str, raw: Path) -> Path:
    """Bring the images below `s3://bucket/prefix` to a directory in `raw` and return it.

    Afterwards the directory holds exactly the listed images. A file appears only when it is whole; those that the index
    beside the directory records with the listing's size and ETag are not downloaded again, so an interrupted fetch
    carries on. Raises InputError, naming the URI, for whatever keeps the images from being fetched.
    """
    bucket, prefix = parse_uri(uri, "params.yaml: data.source")
    directory = raw / "s3" / bucket / quote(prefix or "/", safe="")
    index_file = directory.with_name(directory.name + ".json")
    with connected(uri, bucket, "s3:ListBucket and s3:GetObject", at_once=_AT_ONCE) as client:
        remotes = _list(client, uri, bucket, prefix)
        index = _read_index(index_file)
        complete = {r.path for r in remotes if index.get(r.path) == r.version and _has_size(directory / r.path, r.size)}
        wanted = [remote for remote in remotes if remote.path not in complete]
        log.info("%s: %s images, %s to fetch", uri, f"{len(remotes):,}", f"{len(wanted):,}")
        index = {path: version for path, version in index.items() if path in complete}
        _remove_others(directory, {remote.path for remote in remotes})
        try:
            for count, remote in enumerate(_download_all(client, bucket, wanted, directory), start=1):
                index[remote.path] = remote.version
                if count % _SAVE_EVERY == 0:
                    write_json(index_file, index)
        finally:
            write_json(index_file, index)
    return directory


def _list(client: "S3Client", uri: str, bucket: str, prefix: str) -> list[Remote]:
    """The images below the prefix, sorted by path; other kinds of objects are left out, as in a folder."""
    start = f"{prefix}/" if prefix else ""
    remotes = []
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=start, PaginationConfig={"PageSize": _PAGE}
    )
    for page in pages:
        for entry in page.get("Contents", []):
            path = entry["Key"].removeprefix(start)
            if path.lower().endswith(SUFFIXES):
                _refuse_escape(uri, entry["Key"], path)
                if not any(part.startswith(".") for part in path.split("/")):
                    remotes.append(Remote(path, entry["Key"], entry["Size"], entry["ETag"].strip('"')))
    if not remotes:
        raise InputError(f"{uri}: no images below this prefix ({', '.join(SUFFIXES)})")
    remotes.sort(key=lambda remote: remote.path)
    directories = {str(parent) for remote in remotes for parent in PurePosixPath(remote.path).parents}
    for remote in remotes:
        if remote.path in directories:
            raise InputError(f"{uri}: object {remote.key!r} is also the directory of others; a folder cannot hold both")
    return remotes


def _refuse_escape(uri: str, key: str, path: str) -> None:
    """A key is text of somebody else's choosing; as a path it must stay inside the directory."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts) or "\\" in path or "\0" in path:
        raise InputError(f"{uri}: object {key!r} cannot be a file below the folder; rename it")


def _download_all(client: "S3Client", bucket: str, remotes: list[Remote], directory: Path) -> Iterator[Remote]:
    """Download in parallel; gives each object when its file is whole. The first failure stops the rest."""
    start = reported = time.monotonic()
    done = size = 0
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as threads:
        jobs = {
            threads.submit(_download, client, bucket, remote, directory / remote.path): remote for remote in remotes
        }
        try:
            for job in as_completed(jobs):
                job.result()
                yield jobs[job]
                done, size = done + 1, size + jobs[job].size
                now = time.monotonic()
                if now - reported >= _REPORT_SECONDS:
                    rate = size / (now - start) / 1e6
                    log.info("fetched %s of %s, %.1f MB/s", f"{done:,}", f"{len(remotes):,}", rate)
                    reported = now
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _download(client: "S3Client", bucket: str, remote: Remote, destination: Path) -> None:
    """One object to one file, whole or not at all."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with replacing(destination) as temporary:
                # IfMatch: an object that was overwritten since it was listed is an error, not a mixture.
                body = client.get_object(Bucket=bucket, Key=remote.key, IfMatch=remote.etag)["Body"]
                with body, temporary.open("wb") as file:
                    shutil.copyfileobj(body, file, 1 << 20)
                received = temporary.stat().st_size
                if received != remote.size:
                    raise InputError(f"s3://{bucket}/{remote.key}: {received} of {remote.size} bytes received")
            return
        except (
            HTTPClientError,
            IncompleteReadError,
        ):  # the connection broke off inside the body; boto3 does not retry that
            if attempt == ATTEMPTS:
                raise
            time.sleep(0.5 * attempt)


def _read_index(path: Path) -> dict[str, list[int | str]]:
    """Path -> [size, ETag] of the files that are whole; without a readable index everything is fetched again."""
    try:
        index = read_json(path)
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _remove_others(directory: Path, listed: set[str]) -> None:
    """Delete what is no longer in the bucket, and temporary files of a killed fetch."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in listed:
            path.unlink()
