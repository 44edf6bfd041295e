"""What can be refused before anything runs, each with what to do about it; all of it at once, not one a night."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError
from darkroom.registry.dvc_config import Config, read_config
from flows.artifacts import human_size
from flows.notify import check_url
from flows.raw_data import passes, source_of
from flows.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIN_FREE = 1_000_000_000  # bytes where the state and where the cache is; a run on a full disk only makes it fuller

_CREDENTIALS = {  # DVC's -> boto3's
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
}
_FILES = {"credentialpath", "configpath"}  # of a remote: where DVC alone looks for credentials


def problems_of_machine(settings: Settings) -> list[str]:
    """What keeps any run from working here, a line each."""
    return _collected(
        lambda: check_url(settings.webhook) if settings.webhook else None,
        lambda: _check_limit(settings.gpu_limit),
        lambda: _check_disk("DARKROOM_STATE", settings.state),
        lambda: _check_disk("DARKROOM_DVC_CACHE", settings.dvc_cache),
    )


def problems_of_project(root: Path) -> list[str]:
    """What keeps the project at `root` from working: buckets that are not there, credentials that are refused."""
    return _collected(lambda: _check_source(source_of(root)), lambda: _check_remote(root))


def default_remote(root: Path) -> tuple[str, dict[str, str]] | None:
    """Name and settings of the DVC remote that `dvc push` takes; None if there is none."""
    config = _config(root)
    name = config.get("core", {}).get("remote")
    return (name, config.get(f'remote "{name}"', {})) if name else None


def _collected(*checks: Callable[[], None]) -> list[str]:
    problems = []
    for check in checks:
        try:
            check()
        except InputError as error:
            problems += str(error).splitlines()
    return problems


def _check_limit(name: str | None) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    if name is None:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            raise InputError(
                f"DARKROOM_GPU_LIMIT = {name!r}: the Prefect server has no such concurrency limit; "
                "`python -m flows.deploy` creates it"
            ) from None


def _check_disk(setting: str, directory: Path) -> None:
    there = next(place for place in (directory, *directory.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < MIN_FREE:
        raise InputError(
            f"{directory}: {human_size(free)} free, expected at least {human_size(MIN_FREE)}; `dvc gc` removes what no"
            f" commit needs, or {setting} names another place"
        )


def _check_source(source: str) -> None:
    """A source on S3 has to be there. A server that does not answer now is asked again when the data is fetched."""
    from darkroom.data.s3.client import connected, parse_uri

    if not source.startswith("s3://"):
        return
    bucket, prefix = parse_uri(source, "params.yaml: data.source")
    is_empty = False
    with _but_what_passes(), connected(source, bucket, "s3:ListBucket and s3:GetObject", attempts=2) as client:
        is_empty = not client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents")
    if is_empty:
        raise InputError(f"{source}: nothing is there yet; put images below it, or correct data.source")


def _check_remote(root: Path) -> None:
    """A remote on S3 has to have its bucket. One that cannot be reached now may be there when the run ends."""
    from darkroom.data.s3.client import connected, parse_uri

    name, remote = default_remote(root) or ("", {})
    url = remote.get("url", "")
    if not url.startswith("s3://") or _FILES & remote.keys():
        return
    where = f"DVC remote {name!r}, {url}"
    bucket, _ = parse_uri(url, f"DVC remote {name!r}: url")
    client = _client(where, remote)
    with _but_what_passes(), connected(where, bucket, "s3:ListBucket and s3:PutObject", client=client):
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)


@contextmanager
def _but_what_passes() -> Iterator[None]:
    """Let only those InputErrors through that waiting does not mend."""
    try:
        yield
    except InputError as error:
        if not passes(error):
            raise


def _client(where: str, remote: dict[str, str]) -> "S3Client":
    """A client as DVC would make it from a remote's settings. Raises InputError for a profile that is not here."""
    import boto3
    from botocore.config import Config as Botocore
    from botocore.exceptions import BotoCoreError

    keys: dict[str, Any] = {ours: remote[key] for key, ours in _CREDENTIALS.items() if key in remote}
    settings = Botocore(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 2})
    try:
        session = boto3.Session(profile_name=remote.get("profile"), region_name=remote.get("region"))
        return session.client("s3", endpoint_url=remote.get("endpointurl"), config=settings, **keys)
    except (BotoCoreError, ValueError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None


def _config(root: Path) -> Config:
    """DVC's configuration of the project at `root`; what is local counts."""
    shared, local = (read_config(root / ".dvc" / name) for name in ("config", "config.local"))
    return {section: shared.get(section, {}) | local.get(section, {}) for section in {*shared, *local}}
