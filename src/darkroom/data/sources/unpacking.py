"""What has to be unpacked from an archive before it can be read at any place: once, and never more than fits."""

import errno
import shutil
from pathlib import Path
from typing import IO

from darkroom.data.sources.reading import file_entry
from darkroom.errors import InputError
from darkroom.files import digest_json

_PIECE = 1 << 20


def unpacked_name(archive: Path) -> str:
    """What the unpacked content of `archive` is called in a scratch directory; new when the archive may be."""
    return f"unpacked-{digest_json([str(archive.resolve().parent), *file_entry(archive)])[:16]}"


def unpack(stream: IO[bytes], size: int, target: Path, what: str) -> None:
    """Write the `size` bytes that an archive's member declares, read from `stream`, to `target`.

    Raises InputError, which starts with `what`, when the disk is too small or the member has fewer bytes; lets errors
    of the stream pass.
    """
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise InputError(f"{what}: {size:,} bytes have to be unpacked to {target.parent}, which has {free:,} left")
    try:
        with target.open("wb") as file:
            shutil.copyfileobj(stream, file, _PIECE)
            written = file.tell()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{what}: {size:,} bytes have to be unpacked to {target.parent}; the disk is full: {error.strerror}"
        ) from None
    if written != size:
        raise InputError(f"{what}: damaged: {size:,} bytes declared, {written:,} found")
