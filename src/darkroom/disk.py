"""A disk that is full or may not be written to, and a damaged database: told from what each library raises."""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

_ERRNOS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_SQLITE = _DAMAGED | {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_RUST = re.compile(r"\(os error (\d+)\)")  # at the end of what safetensors says
_SHORT = re.compile(r"\d+ requested and \d+ written")  # what NumPy says, without an error number


def disk_error(error: BaseException) -> OSError | None:
    """What the disk said, with an error number and where known a file name; None if `error` is of another kind."""
    for one in _causes(error):
        number = one.errno if isinstance(one, OSError) else None
        if type(one).__name__ == "SafetensorError" and (found := _RUST.search(str(one))):
            number = int(found[1])
        elif isinstance(one, OSError) and number is None and _SHORT.match(str(one)):
            number = errno.ENOSPC
        if number in _ERRNOS:
            return OSError(number, os.strerror(number), getattr(one, "filename", None))
    return None


def sentence(error: OSError) -> str:
    """One line for a person."""
    return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}; nothing half-written is left"


def database_problem(error: BaseException, file: str) -> str | None:
    """One line about the SQLite database in `file` that is damaged or cannot be written; None for any other error."""
    for one in _causes(error):
        code = getattr(one, "sqlite_errorcode", 0) & 0xFF  # without the part that says in which call
        if isinstance(one, sqlite3.Error) and code in _DAMAGED:
            return (
                f"the database {file} is damaged ({one}): put a backup in its place, save what can be read with "
                f"`sqlite3 {file} .recover`, or move it away to begin without versions and history"
            )
        if isinstance(one, sqlite3.Error) and code in _SQLITE:
            return f"the database {file} cannot be written or read: {one}; it is as it was, mend that and repeat this"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was made from; SQLAlchemy keeps the driver's beside."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or getattr(found, "orig", None)
