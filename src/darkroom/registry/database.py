"""A database as the place of runs: whether it answers, and one process at a time where MLflow makes its tables."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from sqlalchemy import Engine

_CONNECT_SECONDS = 5
_LOCK = int.from_bytes(b"darkroom", "big")  # names the lock among those of other programs


def is_served(uri: str) -> bool:
    """Whether this is the URI of a database that a server holds, not of a file."""
    parts = urlsplit(uri)
    return parts.scheme.partition("+")[0] in ("postgresql", "mysql", "mssql") and parts.hostname is not None


def sign_in(uri: str) -> None:
    """Connect once. MLflow itself tries for two minutes, whatever the reason. Raises SQLAlchemyError, ImportError."""
    with contextlib.closing(_engine(uri).connect()):
        pass


@contextlib.contextmanager
def schema_lock(uri: str) -> Iterator[None]:
    """Hold off all hosts that use this database: MLflow's migrations crash side by side. PostgreSQL's own lock."""
    if urlsplit(uri).scheme.partition("+")[0] != "postgresql":
        yield
        return
    from sqlalchemy import text

    with _engine(uri).begin() as connection:  # the lock lasts as long as the transaction
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        yield


def _engine(uri: str) -> "Engine":
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    seconds = {} if uri.startswith("mssql") else {"connect_timeout": _CONNECT_SECONDS}
    return create_engine(uri, poolclass=NullPool, connect_args=seconds)
