"""Members of a zip file, read without extracting anything and without reading its directory again for every part."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from darkroom.data.images import MAX_BYTES, Unreadable
from darkroom.errors import InputError

_HEADER = 30  # bytes of a member's local header before its name
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Member:
    """What the zip's directory says of a file."""

    offset: int  # of its local header
    method: int  # zipfile.ZIP_STORED or ZIP_DEFLATED; others are not read
    stored: int  # bytes in the zip
    size: int  # bytes of the file
    crc: int
    encrypted: bool


@dataclass(frozen=True)
class Members:
    """The contents of members of the zip at `path`, in order."""

    path: str
    members: list[Member]

    def __iter__(self) -> Iterator[bytes | Unreadable]:
        with open(self.path, "rb") as file:  # noqa: PTH123
            for member in self.members:
                yield _read(file.fileno(), member)


def list_members(path: Path) -> dict[str, Member]:
    """The files in a zip by name. Raises InputError for what is no whole zip, and for names that reach outside, come
    twice, or are no file names."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: no zip file that can be read, or not all of one: {error}") from None
    members: dict[str, Member] = {}
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        if entry.orig_filename.startswith("/") or ".." in parts or "\\" in entry.orig_filename or not parts:
            raise InputError(f"{path}: member {entry.orig_filename!r} reaches outside the archive; refused")
        if entry.is_dir():
            continue
        name = "/".join(parts)
        if name in members:
            raise InputError(f"{path}: member {name!r} is there twice")
        members[name] = Member(
            offset=entry.header_offset,
            method=entry.compress_type,
            stored=entry.compress_size,
            size=entry.file_size,
            crc=entry.CRC,
            encrypted=bool(entry.flag_bits & _ENCRYPTED),
        )
    return members


def read_member(path: Path, member: Member) -> bytes | Unreadable:
    """The content of one member."""
    return next(iter(Members(str(path), [member])))


def _read(descriptor: int, member: Member) -> bytes | Unreadable:
    """A member's bytes. It is never unpacked beyond the size that it declares, nor beyond the limit for a file."""
    if member.encrypted:
        return Unreadable("encrypted", member.size)
    if member.size > MAX_BYTES:
        return Unreadable(f"{member.size:,} bytes, over the limit of {MAX_BYTES:,}", member.size)
    if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Unreadable(f"compressed by method {member.method}; expected stored or deflated", member.size)
    header = os.pread(descriptor, _HEADER, member.offset)
    if header[:4] != b"PK\x03\x04" or len(header) < _HEADER:
        return Unreadable("damaged: its header is not where the archive's directory says", member.size)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = os.pread(descriptor, min(member.stored, MAX_BYTES), member.offset + _HEADER + lengths)
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        except zlib.error as error:
            return Unreadable(f"damaged: {error}", member.size)
    if len(content) != member.size:
        return Unreadable("damaged: not of the size that the archive declares", member.size)
    if zlib.crc32(content) != member.crc:
        return Unreadable("damaged: wrong checksum in the archive", member.size)
    return content
