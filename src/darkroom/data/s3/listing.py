"""Which objects of a bucket belong to a source."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from darkroom.data.images import SUFFIXES
from darkroom.errors import InputError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DATA_SUFFIXES = (".json", ".parquet", ".npz", ".bin", ".txt")  # of files that hold images or tell of them

_PAGE = 1000  # objects per answer of the listing, S3's maximum


@dataclass(frozen=True, slots=True)
class Remote:
    """An object of the listing."""

    path: str  # of its file, relative to where the source's files lie
    key: str
    size: int  # bytes
    etag: str  # without quotes; changes with the content


def local_name(prefix: str) -> str:
    """What a prefix or a key is called as one file name."""
    return quote(prefix or "/", safe="")


def find_object(client: "S3Client", bucket: str, key: str) -> Remote | None:
    """The object that is called exactly `key`. An empty one without a suffix does not count: some tools make such for
    folders."""
    # A listing, not a HEAD: its errors have a text, and it needs no other permission.
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", []):
        if entry["Key"] == key and (entry["Size"] or PurePosixPath(key).suffix):
            return Remote(local_name(key), key, entry["Size"], entry["ETag"].strip('"'))
    return None


def list_prefix(client: "S3Client", uri: str, bucket: str, prefix: str) -> list[Remote]:
    """Images and files with data below the prefix, sorted by path; other kinds and hidden ones are left out.

    Raises InputError if there are none, or if some cannot be files below one folder.
    """
    start = f"{prefix}/" if prefix else ""
    remotes = []
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=start, PaginationConfig={"PageSize": _PAGE}
    )
    for page in pages:
        for entry in page.get("Contents", []):
            path = entry["Key"].removeprefix(start)
            if path.lower().endswith(SUFFIXES + DATA_SUFFIXES):
                _refuse_escape(uri, entry["Key"], path)
                if not any(part.startswith(".") for part in path.split("/")):
                    remotes.append(Remote(path, entry["Key"], entry["Size"], entry["ETag"].strip('"')))
    if not remotes:
        raise InputError(f"{uri}: no images or data below this prefix ({', '.join(SUFFIXES + DATA_SUFFIXES)})")
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
