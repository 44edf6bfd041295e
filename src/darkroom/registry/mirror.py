"""Copies of a training's checkpoints on S3, for machines that can vanish: `s3://bucket/prefix/<fingerprint>/`.

Endpoint, region and credentials come from the usual AWS environment. An upload that a kill cuts short leaves parts that
only the bucket can clear: give it a lifecycle rule that aborts incomplete multipart uploads.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from darkroom.data.s3.client import connected, parse_uri
from darkroom.errors import StageFailed
from darkroom.files import replacing
from darkroom.training.checkpoints import defect, newest_step, path_of, step_of, voucher_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SETTING = "DARKROOM_CHECKPOINT_MIRROR"
_NEEDS = "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
_log = logging.getLogger(__name__)


class S3Mirror:
    """The copies of one training. Its methods raise InputError, in one line, for whatever S3 refuses."""

    def __init__(self, uri: str, fingerprint: str) -> None:
        bucket, prefix = parse_uri(uri, SETTING)
        self.uri = uri
        self._fingerprint, self._bucket = fingerprint, bucket
        self._start = f"{prefix}/{fingerprint}/" if prefix else f"{fingerprint}/"
        self._client: S3Client | None = None
        self._pushed: dict[str, tuple[int, int]] = {}  # name -> size and time of change of what is there
        self._strays: set[str] = set()  # files of checkpoints that were found there and that the directory lacks

    @classmethod
    def from_environment(cls, fingerprint: str) -> "S3Mirror | None":
        """The mirror that `DARKROOM_CHECKPOINT_MIRROR` names, if it is set. Raises InputError for what is no S3 URI."""
        uri = os.environ.get(SETTING)
        return cls(uri, fingerprint) if uri else None

    def push(self, files: Sequence[Path]) -> None:
        """Upload the files in this order; those of tensors that are there already, unchanged, are left out.

        The last one lies in the training's directory; names are relative to that.
        """
        directory = files[-1].parent
        with self._connected() as client:
            for file in files:
                name, state = file.relative_to(directory).as_posix(), file.stat()
                version = state.st_size, state.st_mtime_ns
                self._strays.discard(name)
                if file.suffix != ".safetensors":  # small, and the training may be appending to it
                    client.put_object(Bucket=self._bucket, Key=self._start + name, Body=file.read_bytes())
                elif self._pushed.get(name) != version:
                    client.upload_file(str(file), self._bucket, self._start + name)
                    self._pushed[name] = version

    def drop(self, names: Collection[str]) -> None:
        """Delete the objects of these names, and those of checkpoints that `pull` found and left there."""
        with self._connected() as client:
            # Vouchers first: without one, tensors do not count.
            for name in sorted({*names, *self._strays}, key=lambda name: (not name.endswith(".json"), name)):
                client.delete_object(Bucket=self._bucket, Key=self._start + name)
                self._strays.discard(name)
                self._pushed.pop(name, None)

    def pull(self, directory: Path) -> None:
        """Fetch the newest whole checkpoint and its companions, unless the directory holds a whole one as new.

        Call it before training. It also shows that the mirror can be written to. A damaged checkpoint is passed over
        with one line in the log. Raises StageFailed if the directory cannot take the files.
        """
        with self._connected() as client:
            check = self._start + ".write-check"
            client.put_object(Bucket=self._bucket, Key=check, Body=b"")
            client.delete_object(Bucket=self._bucket, Key=check)
            found = self._list(client)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._fetch_newest(client, directory, found)
                for name, (size, uploaded) in found.items():
                    file = directory / name
                    if step_of(name) is not None and not file.exists():
                        self._strays.add(name)
                    elif name.endswith(".safetensors") and file.exists():
                        state = file.stat()
                        if state.st_size == size and state.st_mtime < uploaded:
                            self._pushed[name] = size, state.st_mtime_ns
            except OSError as error:
                reason = error.strerror or error
                raise StageFailed(f"{directory}: cannot take what {self.uri} holds: {reason}") from None

    def _list(self, client: "S3Client") -> dict[str, tuple[int, float]]:
        """Name -> size and time of upload; names that could lead out of a directory are left out."""
        found = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._start):
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(self._start)
                if re.fullmatch(r"(\w[\w.-]*/)*\w[\w.-]*", name) and name != "lock":
                    found[name] = entry["Size"], entry["LastModified"].timestamp()
        return found

    def _fetch_newest(self, client: "S3Client", directory: Path, found: Collection[str]) -> None:
        vouched = {step for name in found if name.endswith(".json") and (step := step_of(name)) is not None}
        here = newest_step(directory, self._fingerprint) if vouched else None
        for step in sorted(vouched, reverse=True):
            if here is not None and step <= here:
                return
            path = path_of(directory, step)
            names = [path.name] * (path.name in found) + [voucher_of(path).name]
            with TemporaryDirectory(prefix=".pull.", suffix=".tmp", dir=directory) as temporary:
                for name in names:
                    client.download_file(self._bucket, self._start + name, str(Path(temporary, name)))
                reason = defect(Path(temporary, path.name), self._fingerprint)
                if reason is not None:
                    _log.warning("checkpoint %s of %s is passed over: %s", path.name, self.uri, reason)
                    continue
                for name in sorted(name for name in found if step_of(name) is None):
                    with replacing(directory / name) as file:
                        client.download_file(self._bucket, self._start + name, str(file))
                    state = (directory / name).stat()
                    self._pushed[name] = state.st_size, state.st_mtime_ns
                for name in names:  # the voucher last
                    with replacing(directory / name) as file:
                        Path(temporary, name).replace(file)
            _log.info("the checkpoint of step %d was fetched from %s", step, self.uri)
            return

    @contextmanager
    def _connected(self) -> Iterator["S3Client"]:
        with connected(self.uri, self._bucket, _NEEDS, client=self._client) as client:
            self._client = client
            yield client
