"""What a server states of an object, and whether a file agrees: against hashlib and zlib."""

import base64
import hashlib
import zlib
from pathlib import Path

import pytest

from darkroom.data.s3.checksums import Damaged, stated, verify

CONTENT = bytes(range(256)) * 20_000  # 5 MB: more than one block
MD5 = hashlib.md5(CONTENT).hexdigest()


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


WHOLE = {
    "ChecksumSHA512": b64(hashlib.sha512(CONTENT).digest()),
    "ChecksumSHA256": b64(hashlib.sha256(CONTENT).digest()),
    "ChecksumSHA1": b64(hashlib.sha1(CONTENT).digest()),
    "ChecksumCRC32": b64(zlib.crc32(CONTENT).to_bytes(4, "big")),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def no_parts(number: int) -> int:
    raise AssertionError(f"asked for part {number}")


@pytest.mark.parametrize("name", WHOLE)
def test_checksum_of_all_bytes_is_compared(file: Path, name: str) -> None:
    answer = {"ETag": '"no digest"', "ChecksumType": "FULL_OBJECT", name: WHOLE[name]}
    assert verify(file, stated(answer, "bucket"), no_parts)
    file.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(Damaged, match=base64.b64decode(WHOLE[name]).hex()):
        verify(file, stated(answer, "bucket"), no_parts)


def test_etag_of_a_plain_upload_is_compared(file: Path) -> None:
    assert verify(file, stated({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}, "bucket"), no_parts)
    file.write_bytes(CONTENT[1:] + CONTENT[:1])
    with pytest.raises(Damaged, match=MD5):
        verify(file, stated({"ETag": f'"{MD5}"'}, "bucket"), no_parts)


@pytest.mark.parametrize(
    ("answer", "bucket"),
    [
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"}, "bucket"),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms:dsse"}, "bucket"),
        ({"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"}, "bucket"),
        ({"ETag": f'"{MD5}"'}, "bucket--usw2-az1--x-s3"),
        ({"ETag": '"0x8DCE"'}, "bucket"),
        ({}, "bucket"),
    ],
)
def test_etag_that_is_no_digest_is_not_compared(file: Path, answer: dict[str, str], bucket: str) -> None:
    assert stated(answer, bucket) is None
    assert not verify(file, None, no_parts)


def test_checksum_that_python_cannot_compute_leaves_the_etag() -> None:
    found = stated({"ETag": f'"{MD5}"', "ChecksumCRC64NVME": "AAAAAAAAAAA=", "ChecksumType": "FULL_OBJECT"}, "bucket")
    assert found is not None
    assert (found.name, found.digest.hex()) == ("ETag", MD5)


@pytest.mark.parametrize("sizes", [[2_000_000, 2_000_000, 1_120_000], [5_120_000], [100, 5_119_900]], ids=str)
@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_digest_of_parts_is_compared(file: Path, sizes: list[int], algorithm: str) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [CONTENT[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    digest = hashlib.new(algorithm, b"".join(hashlib.new(algorithm, part).digest() for part in parts)).digest()
    answer = {"ETag": f'"{digest.hex()}-{len(sizes)}"'}
    if algorithm == "sha256":
        answer = {"ETag": f'"{MD5}-9"', "ChecksumSHA256": f"{b64(digest)}-{len(sizes)}", "ChecksumType": "COMPOSITE"}
    assert verify(file, stated(answer, "bucket"), lambda number: sizes[number - 1])
    file.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(Damaged, match=digest.hex()):
        verify(file, stated(answer, "bucket"), lambda number: sizes[number - 1])


def test_server_that_does_not_tell_parts_apart_is_asked_once(file: Path) -> None:
    asked = []

    def whole(number: int) -> int:
        asked.append(number)
        return len(CONTENT)

    assert not verify(file, stated({"ETag": f'"{MD5}-700"'}, "bucket"), whole)
    assert asked == [1]


def test_checksum_of_unknown_kind_of_an_upload_in_parts_is_left_alone() -> None:
    """Without its type, it may be of all bytes or of the parts' checksums."""
    found = stated({"ETag": f'"{MD5}-2"', "ChecksumCRC32": "AAAAAA=="}, "bucket")
    assert found is not None
    assert found.name == "ETag"
