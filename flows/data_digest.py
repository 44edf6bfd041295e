"""What a data source holds now, in one digest: tells whether anything changed, without fetching or decoding images.

Only what a source's readers look at counts: images and files with data, hidden ones left out. On S3 the listing says
all: the ETag of an object is the MD5 of its content, or for one that was uploaded in parts a digest that depends on
their size too. So the same bytes put again give the same digest, unless they come in parts of another size. Of local
files the contents are hashed, once: a file that is merely touched is no new data.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError
from darkroom.files import digest_file, digest_json, read_json, write_json
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SETTLED_NS = 2_000_000_000  # a file changed within this time may change again without a new time stamp
_PAGE = 1000  # objects per answer of the listing, S3's maximum

# Name below the source, size in bytes, digest of the content.
Entry = tuple[str, int, str]


@dataclass(frozen=True)
class Look:
    """A source as it was found."""

    source: str
    digest: str
    objects: int
    bytes: int
    newest: datetime  # UTC, of the latest change
    at: datetime  # UTC, of this look, by the clock that `newest` was read from


def look_at(source: str, root: Path, hashes: Path) -> Look:
    """Look at `s3://bucket/prefix`, an object, or a folder or file below `data/raw` of the project at `root`.

    `hashes` is a directory that remembers the digests of local files. Raises InputError for a source that does not
    exist, is empty, cannot be reached, never changes, or would change without DVC seeing it.
    """
    if source.startswith("s3://"):
        return _look_at_s3(source)
    if source in ("digits", "photos") or "://" in source:
        raise InputError(
            f"data.source = {source!r}: nothing to watch; expected s3://bucket/prefix or a path in data/raw"
        )
    path, raw = Path(os.path.normpath(root / source)), Workspace(root).raw
    if not path.is_relative_to(raw):
        raise InputError(
            f"{path}: only what lies below {raw} makes DVC prepare data again when it changes; move it there"
        )
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; data.source in params.yaml names it, or watch's `source`")
    try:
        return _look_at_path(source, path, hashes / f"{digest_json(str(path.resolve()))[:16]}.json")
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None


def _look_at_s3(uri: str) -> Look:
    from darkroom.data.s3.client import connected, parse_uri

    bucket, prefix = parse_uri(uri, "data.source")
    at = datetime.now(UTC)
    entries: list[Entry] = []
    newest = datetime.fromtimestamp(0, UTC)
    with connected(uri, bucket, "s3:ListBucket") as client:
        for page in _pages(client, uri, bucket, prefix):
            if date := page["ResponseMetadata"]["HTTPHeaders"].get("date"):
                at = parsedate_to_datetime(date)
            for found in page.get("Contents", []):
                name = found["Key"].removeprefix(prefix).lstrip("/")
                if not name or _counts(name):
                    entries.append((name, found["Size"], found["ETag"].strip('"')))
                    newest = max(newest, found["LastModified"])
    return _look(uri, entries, newest, at)


def _pages(client: "S3Client", uri: str, bucket: str, prefix: str) -> Iterator[Any]:
    """The listing of the one object that is called `prefix`, or else of what lies below it."""
    from darkroom.data.s3.listing import find_object

    if prefix and not uri.endswith("/") and find_object(client, bucket, prefix):
        yield client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return
    start = f"{prefix}/" if prefix else ""
    pages = client.get_paginator("list_objects_v2")
    yield from pages.paginate(Bucket=bucket, Prefix=start, PaginationConfig={"PageSize": _PAGE})


def _look_at_path(source: str, path: Path, cache: Path) -> Look:
    known = _read_cache(cache)
    seen: dict[str, list[Any]] = {}
    entries: list[Entry] = []
    began = time.time_ns()
    newest = 0
    for name, file in [("", path)] if path.is_file() else _files(path):
        try:
            status = file.stat()
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
            if file.is_dir():  # its time tells of what was removed
                continue
            # The times of a change cannot be set back: `touch -d` and `rsync -t` do that to st_mtime alone.
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            remembered = known.get(name)
            digest = remembered[-1] if remembered and remembered[:-1] == stamp else digest_file(file)
        except FileNotFoundError:  # removed since it was listed
            continue
        if began - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            seen[name] = [*stamp, digest]
        entries.append((name, status.st_size, digest))
    if seen != known:
        write_json(cache, seen)
    return _look(source, entries, datetime.fromtimestamp(newest / 1e9, UTC), datetime.fromtimestamp(began / 1e9, UTC))


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Each file that counts and each directory below `root`, links followed; no directory is entered twice."""
    entered: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise error

    for directory, directories, files in os.walk(root, followlinks=True, onerror=refuse):
        here = Path(directory)
        status = here.stat()
        if (status.st_dev, status.st_ino) in entered:
            directories.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield "", here
        for name in sorted(files):
            file = here / name
            if _counts(path := file.relative_to(root).as_posix()):
                yield path, file


def _counts(name: str) -> bool:
    """Whether a reader of folders would look at this name, relative to the source."""
    from darkroom.data.images import SUFFIXES
    from darkroom.data.s3.listing import DATA_SUFFIXES

    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES + DATA_SUFFIXES)


def _look(source: str, entries: Iterable[Entry], newest: datetime, at: datetime) -> Look:
    entries = sorted(entries)
    if not entries:
        raise InputError(f"{source}: no images or data here; put some, or correct data.source in params.yaml")
    hasher = hashlib.sha256()
    for name, size, digest in entries:
        hasher.update(f"{name}\0{size}\0{digest}\n".encode(errors="surrogateescape"))
    return Look(source, hasher.hexdigest(), len(entries), sum(size for _, size, _ in entries), newest, at)


def _read_cache(path: Path) -> dict[str, list[Any]]:
    """What an earlier look remembered; what cannot be read is hashed again."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
