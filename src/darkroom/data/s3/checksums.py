"""Whether a file holds what the server has: by the checksum that it states for the object, else by its ETag."""

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

_CHUNK = 1 << 20


class Damaged(Exception):
    """The bytes are not the object's; the text gives both digests."""


class _Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


# What the standard library can compute, the strongest first. S3's CRC32C and CRC64NVME it cannot; then the ETag serves.
_HASHERS: dict[str, Callable[[], _Hasher]] = {
    "SHA512": hashlib.sha512,
    "SHA256": hashlib.sha256,
    "SHA1": hashlib.sha1,
    "MD5": hashlib.md5,
    "CRC32": _Crc32,
}


@dataclass(frozen=True)
class Stated:
    """A digest that the server states."""

    name: str  # "SHA256", "ETag", …
    algorithm: str  # a key of _HASHERS
    digest: bytes
    parts: int  # 0: of all bytes; n: of the digests of the n parts in which the object was uploaded


def stated(answer: Mapping[str, Any], bucket: str) -> Stated | None:
    """The digest in an answer to GetObject or HeadObject that can be compared with bytes, if there is one."""
    etag = answer.get("ETag", "").strip('"')
    for algorithm in _HASHERS:
        if text := answer.get(f"Checksum{algorithm}"):
            value, _, parts = text.partition("-")
            composite = bool(parts) or answer.get("ChecksumType") == "COMPOSITE"
            if composite and not parts:
                continue
            # Of an upload in parts, only the type can say that a checksum without their number is of all bytes.
            if not composite and "-" in etag and answer.get("ChecksumType") != "FULL_OBJECT":
                continue
            return Stated(algorithm, algorithm, base64.b64decode(value), int(parts or 0))
    # With a key of the customer's or of KMS, and in directory buckets, an ETag is no MD5.
    if "kms" in answer.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in answer or bucket.endswith("--x-s3"):
        return None
    if match := re.fullmatch(r"([0-9a-f]{32})(?:-(\d+))?", etag):
        return Stated("ETag", "MD5", bytes.fromhex(match[1]), int(match[2] or 0))
    return None


def verify(path: Path, expected: Stated | None, part_size: Callable[[int], int]) -> bool:
    """Whether the file could be compared with what the server states. `part_size(n)` is the size of the object's part n
    in bytes, counted from 1; it is asked only for objects that were uploaded in parts.

    Raises Damaged if they differ.
    """
    if expected is None:
        return False
    if not expected.parts:
        return _compare(_digest(path, expected.algorithm), expected)
    size, first = path.stat().st_size, part_size(1)
    if first >= size and expected.parts > 1:  # a server that does not tell parts apart
        return False
    if (expected.parts - 1) * first < size <= expected.parts * first:
        equal = [first] * (expected.parts - 1) + [size - (expected.parts - 1) * first]
        if _digest_of_parts(path, expected.algorithm, equal) == expected.digest:
            return True
    # Parts may differ in size, which is rare and takes a request for each.
    sizes = [first, *(part_size(number) for number in range(2, expected.parts + 1))]
    return sum(sizes) == size and _compare(_digest_of_parts(path, expected.algorithm, sizes), expected)


def _compare(digest: bytes, expected: Stated) -> bool:
    if digest != expected.digest:
        raise Damaged(f"{expected.name} of what came is {digest.hex()}, the server states {expected.digest.hex()}")
    return True


def _digest(path: Path, algorithm: str) -> bytes:
    with path.open("rb") as file:
        return _digest_of_next(file, algorithm, path.stat().st_size)


def _digest_of_parts(path: Path, algorithm: str, sizes: list[int]) -> bytes:
    hasher = _HASHERS[algorithm]()
    with path.open("rb") as file:
        for size in sizes:
            hasher.update(_digest_of_next(file, algorithm, size))
    return hasher.digest()


def _digest_of_next(file: BinaryIO, algorithm: str, size: int) -> bytes:
    hasher = _HASHERS[algorithm]()
    while size and (chunk := file.read(min(size, _CHUNK))):
        hasher.update(chunk)
        size -= len(chunk)
    return hasher.digest()
