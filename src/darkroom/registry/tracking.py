"""The tracking server: where it is, a client that is known to answer, and MLflow kept quiet."""

import contextlib
import fcntl
import http.client
import logging
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from darkroom.disk import database_problem, disk_error
from darkroom.errors import StageFailed
from darkroom.registry import database
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PROBE_SECONDS = 5.0  # for a server's first sign of life

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # there is JSON to be read there
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # MLflow's own 120 s and 7 retries keep a person waiting for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "AWS_EC2_METADATA_DISABLED": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class RegistryUnavailable(StageFailed):
    """The tracking server or database does not answer. The message is one line; the command can be repeated later."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h: whoever runs the command can tell that trying again makes sense


class RegistryRefused(RegistryUnavailable):
    """The server answers, and does not let this user: trying again changes nothing."""

    exit_code = 1


def import_mlflow() -> ModuleType:
    """MLflow, without telemetry, progress bars or pickle. Importing it takes seconds: do it where it is needed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    import mlflow

    for chatty in ("alembic", "mlflow.tracking"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints each error with its traceback, too
    return mlflow


def tracking_uri(workspace: Workspace) -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the project's state; absolute whatever the working directory."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{workspace.state / 'mlflow.db'}"
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(f"{prefix}/") and not uri.startswith(f"{prefix}:memory:"):
        return f"{prefix}{workspace.root / uri.removeprefix(prefix)}"
    return uri


def artifact_root(workspace: Workspace) -> str | None:
    """Where a new experiment keeps artifacts: `DARKROOM_ARTIFACT_ROOT`, the project's state, or None: the server's."""
    if root := os.environ.get("DARKROOM_ARTIFACT_ROOT"):
        return root if "://" in root else (workspace.root / root).as_uri()
    if tracking_uri(workspace).startswith(("http://", "https://", "databricks")):
        return None
    return (workspace.state / "artifacts").as_uri()


def connect(workspace: Workspace) -> "MlflowClient":
    """A client whose server has answered. Raises RegistryUnavailable within seconds if it does not."""
    mlflow = import_mlflow()
    uri = tracking_uri(workspace)
    _probe(uri)
    with unavailable_is_one_line(uri), _schema_lock(workspace, uri):
        client: MlflowClient = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextlib.contextmanager
def unavailable_is_one_line(uri: str) -> Iterator[None]:
    """Turn what MLflow raises when a server or database fails, or refuses this user, into RegistryUnavailable.

    A full disk here or a damaged database does not get better by trying again: StageFailed.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if why := _refused(error):
            raise RegistryRefused(f"MLflow at {shown(uri)}{why}") from None
        if problem := _problem_here(error, uri):
            raise StageFailed(f"MLflow: {problem}") from None
        raise RegistryUnavailable(f"MLflow at {shown(uri)}: {without_password(first_line(error), uri)}") from None


def _problem_here(error: BaseException, uri: str) -> str | None:
    """What is wrong with this machine's disk or with the database file, if it is that."""
    if uri.startswith("sqlite:///") and (problem := database_problem(error, uri.removeprefix("sqlite:///"))):
        return problem
    if found := disk_error(error):
        return f"{found.filename or shown(uri)} cannot be written or read: {found.strerror}; mend that and repeat this"
    return None


def _refused(error: BaseException) -> str | None:
    """What to do about a user that the server does not know or does not let, as the rest of a sentence."""
    user, code = os.environ.get("MLFLOW_TRACKING_USERNAME"), getattr(error, "error_code", None)
    if code == "UNAUTHENTICATED":
        needed = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f" does not know user {user!r} with this password: check {needed}" if user else f" wants {needed}"
    if code == "PERMISSION_DENIED":
        return f": user {user!r} may not do this; it takes the permission EDIT or MANAGE on the model and its runs"
    return None


@contextlib.contextmanager
def current(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's current one: `log_model`, and parts of the registry, know no client and use that."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # writes to the environment as well
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # removes it from there
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def shown(uri: str) -> str:
    """The URI without a password."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def without_password(text: str, uri: str) -> str:
    password = urlsplit(uri).password
    return text.replace(f":{password}@", ":***@") if password else text


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _probe(uri: str) -> None:
    """Raise RegistryUnavailable unless something answers at `uri` within a few seconds. Files always do."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            with contextlib.suppress(urllib.error.HTTPError):  # any status is a sign of life
                bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # urllib knows no user:password@
                urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=_PROBE_SECONDS).close()
        elif parts.hostname:
            port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(parts.scheme.split("+")[0])
            if port:
                socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()
            if database.is_served(uri):
                _sign_in(uri)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # MLflow has settings of its own for certificates; let it decide
        why = without_password(first_line(error), uri)
        raise RegistryUnavailable(f"MLflow at {shown(uri)} does not answer: {why}") from None


def _sign_in(uri: str) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        database.sign_in(uri)
    except ImportError as error:
        extra = "; `pip install 'darkroom[postgres]'`" if uri.startswith("postgresql") else ""
        raise RegistryUnavailable(f"MLflow at {shown(uri)}: {first_line(error)}{extra}") from None
    except SQLAlchemyError as error:
        raise RegistryUnavailable(f"MLflow at {shown(uri)}: {without_password(first_line(error), uri)}") from None


@contextlib.contextmanager
def _schema_lock(workspace: Workspace, uri: str) -> Iterator[None]:
    """Hold other processes off while MLflow may be creating its tables: several at once on a fresh database crash."""
    if uri.startswith(("http://", "https://")):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else workspace.state / "mlflow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with database.schema_lock(uri):
            yield
