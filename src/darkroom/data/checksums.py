"""Checksums that a publisher states."""

import hashlib
from pathlib import Path

from darkroom.errors import InputError


def verify(path: Path, checksum: str) -> None:
    """Raise InputError unless the file has `checksum`: "sha256:…" or "md5:…"."""
    kind, _, expected = checksum.partition(":")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if found != expected:
        raise InputError(
            f"{path}: {kind} {found}; params.yaml: data.checksum declares {expected}: "
            "damaged, cut short, or another file"
        )
