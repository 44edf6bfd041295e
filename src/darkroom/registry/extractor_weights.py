"""Files that scores depend on and that others publish: fetched once from where a variable says, known by their sha256.

They are FID's InceptionV3 and reference statistics. A variable holds a path, an `s3://bucket/key` URI or an MLflow
artifact URI. What is fetched is kept in the project's state, and found there when the variable is not set.
"""

import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from darkroom.data.s3.client import connected, parse_uri
from darkroom.data.s3.download import AT_ONCE, ATTEMPTS, download_small, free_bytes
from darkroom.data.s3.listing import find_object
from darkroom.data.s3.ranges import RANGED_ABOVE, download_large
from darkroom.errors import InputError
from darkroom.files import alone_in, digest_file, sync_directory
from darkroom.registry.tracking import connect, current, first_line, tracking_uri, without_password
from darkroom.workspace import Workspace

INCEPTION_VARIABLE = "DARKROOM_INCEPTION_WEIGHTS"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends in the first digits of its sha256
INCEPTION_SHA256 = "6726825d"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
STATISTICS_VARIABLE = "DARKROOM_REFERENCE_STATISTICS"
STATISTICS_FILE = "reference-statistics.npz"

_MLFLOW = ("runs:/", "models:/", "mlflow-artifacts:/")
_FORMS = "a path, an s3://bucket/key URI or an MLflow artifact URI (runs:/…, models:/…, mlflow-artifacts:/…)"

log = logging.getLogger(__name__)


def find_inception(workspace: Workspace, sha256_prefix: str) -> Path:
    """The weights of FID's InceptionV3, verified; `load_inception` reads them. Raises as `fetch_file` does.

    If they are nowhere, the error has several lines and tells how to get them.
    """
    how = ""
    if sha256_prefix.lower().startswith(INCEPTION_SHA256):
        kept = _kept(workspace, INCEPTION_FILE)
        how = (
            "\nThese are the weights of FID's InceptionV3, 95.7 MB. To get them, once:"
            f"\n  curl -L --create-dirs -o '{kept}' {INCEPTION_URL}"
        )
    return fetch_file(workspace, INCEPTION_VARIABLE, INCEPTION_FILE, sha256_prefix, how)


def find_statistics(workspace: Workspace, sha256_prefix: str) -> Path:
    """Published reference statistics, verified; `read_statistics` reads them. Raises as `fetch_file` does."""
    return fetch_file(workspace, STATISTICS_VARIABLE, STATISTICS_FILE, sha256_prefix)


def fetch_file(workspace: Workspace, variable: str, name: str, sha256_prefix: str, how_to_get: str = "") -> Path:
    """A local file whose sha256 begins with `sha256_prefix`, 8 to 64 hexadecimal digits.

    Environment variable `variable` says where it is: a path, relative to the project, of a file that stays there, or a
    URI from which it is fetched to `state/extractors/NAME` unless the right one is there. Without the variable it is
    looked for there. `how_to_get` is added to the message if there is none.

    Raises InputError, in one line but for `how_to_get`, for a file that is missing, not the right one or cannot be
    fetched or kept, RegistryUnavailable if the tracking server is down. What was fetched and is wrong is not kept.
    """
    expected = sha256_prefix.lower()
    if not re.fullmatch("[0-9a-f]{8,64}", expected):
        raise InputError(f"{name}: expected sha256 {sha256_prefix!r}: it must be 8 to 64 hexadecimal digits")
    where, kept = os.environ.get(variable, ""), _kept(workspace, name)
    if where.startswith(("s3://", *_MLFLOW)):
        if not (kept.is_file() and _digest(kept).startswith(expected)):
            _fetch(workspace, variable, where, kept, expected)
        return kept
    if "://" in where:
        raise InputError(f"{variable} = {where!r}: expected {_FORMS}")
    path = workspace.root / Path(where).expanduser() if where else kept
    if not path.exists():
        hint = "" if where else f", and {variable} is not set; it takes {_FORMS}"
        raise InputError(f"{path}: no such file{hint}{how_to_get}")
    _verify(path, path, expected)
    return path


def _kept(workspace: Workspace, name: str) -> Path:
    return workspace.state / "extractors" / name


def _verify(path: Path, called: Path | str, expected: str) -> None:
    found = _digest(path)
    if not found.startswith(expected):
        rest = "" if len(expected) == len(found) else "…"
        raise InputError(f"{called}: its sha256 is {found}, expected {expected}{rest}: damaged, or another file")


def _digest(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _fetch(workspace: Workspace, variable: str, uri: str, kept: Path, expected: str) -> None:
    """Put the file at `uri` in the place of `kept`, if it is the right one."""
    log.info("%s: fetching %s to %s", variable, uri, kept)
    directory, prefix, suffix = kept.parent, f".{kept.name}.", ".tmp"
    busy = InputError(f"{uri}: another process is fetching into {directory}; wait until it is done")
    try:
        with alone_in(directory, busy):
            for stale in directory.glob(f"{prefix}*{suffix}"):  # of a killed process
                shutil.rmtree(stale)
            with TemporaryDirectory(prefix=prefix, suffix=suffix, dir=directory) as temporary:
                if uri.startswith("s3://"):
                    fetched = _from_s3(variable, uri, Path(temporary) / kept.name)
                else:
                    fetched = _from_mlflow(workspace, uri, Path(temporary))
                _verify(fetched, uri, expected)
                with fetched.open("rb") as file:
                    os.fsync(file.fileno())
                fetched.replace(kept)
                sync_directory(directory)
    except OSError as error:
        raise InputError(f"{uri}: cannot be kept in {directory}: {error.strerror or error}") from None


def _from_s3(variable: str, uri: str, destination: Path) -> Path:
    bucket, key = parse_uri(uri, variable)
    with connected(uri, bucket, "s3:ListBucket and s3:GetObject", at_once=AT_ONCE, attempts=ATTEMPTS) as client:
        remote = find_object(client, bucket, key)
        if remote is None:
            raise InputError(f"{uri}: no such object")
        if remote.size > RANGED_ABOVE:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                download_large(client, bucket, remote, destination, threads, lambda _: None)
        else:
            download_small(client, bucket, remote, destination)
    return destination


def _from_mlflow(workspace: Workspace, uri: str, directory: Path) -> Path:
    folder, _, name = uri.rpartition("/")
    if not name or folder in ("runs:", "models:", "mlflow-artifacts:"):
        raise InputError(f"{uri}: names no file of a run, a model or a server; expected {_FORMS}")
    connect(workspace)
    tracking = tracking_uri(workspace)
    with current(tracking):
        import mlflow

        try:
            # Listed first: of a download that fails, MLflow does not tell why.
            there = {Path(entry.path).name: entry for entry in mlflow.artifacts.list_artifacts(f"{folder}/")}
            if name not in there or there[name].is_dir:
                raise InputError(f"{uri}: no such file; {folder} has {', '.join(there) or 'none'}")
            size, free = there[name].file_size or 0, free_bytes(directory)
            if size > free:
                raise InputError(f"{uri}: {size:,} bytes to fetch, but {directory.parent} has {free:,} bytes free")
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(directory)))
        except InputError:
            raise
        except Exception as error:  # every kind of artifact store raises errors of its own
            raise InputError(f"{uri}: {without_password(first_line(error), tracking)}") from None
