"""CIFAR's official archives, whole and hostile."""

import gzip
import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.cifar import is_cifar_folder, open_cifar_archive, open_cifar_folder
from darkroom.errors import InputError
from tests.archives import CIFAR10_NAMES, cifar10, cifar100, random_pixels, write_files, write_tar

BATCHES = [(random_pixels(6, seed=1), [3, 0, 9, 3, 1, 0]), (random_pixels(4, seed=2), [0, 3, 5, 1])]
HELD_OUT = (random_pixels(5, seed=3), [3, 3, 0, 9, 2])
FILES = cifar10(BATCHES, HELD_OUT)
PREFIX = "cifar-10-batches-bin"


def _opened(tmp_path: Path, files: dict[str, bytes] = FILES, others: tuple[tarfile.TarInfo, ...] = ()) -> Source:
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", files, others)
    return open_cifar_archive(path, "cifar-10-binary", tmp_path / "scratch")


def _refused(tmp_path: Path, files: dict[str, bytes] = FILES, others: tuple[tarfile.TarInfo, ...] = ()) -> str:
    with pytest.raises(InputError) as error:
        _opened(tmp_path, files, others)
    assert not list((tmp_path / "scratch").glob(".*"))
    return str(error.value)


def test_pixels_labels_and_splits_are_what_was_put_in(tmp_path: Path) -> None:
    source = _opened(tmp_path)
    pixels = {"data_batch_1": BATCHES[0], "data_batch_2": BATCHES[1], "test_batch": HELD_OUT}
    assert source.classes == CIFAR10_NAMES
    assert source.form == "CIFAR-10 archive"
    assert source.splits is not None
    assert len(set(source.paths)) == 15
    contents = list(source.part(0, 15))
    for path, label, split, content in zip(source.paths, source.labels, source.splits, contents, strict=True):
        part, class_name, place = path.split("/")
        stem, _, row = place.rpartition("-")
        assert part == {TRAIN: "train", TEST: "test"}[int(split)]
        assert (part == "test") == (stem == "test_batch")
        assert class_name == CIFAR10_NAMES[label]
        assert pixels[stem][1][int(row)] == label
        np.testing.assert_array_equal(content, pixels[stem][0][int(row)])


def test_order_is_by_label_then_split_file_and_record(tmp_path: Path) -> None:
    assert _opened(tmp_path).paths[:9] == [
        "train/airplane/data_batch_1-00001",
        "train/airplane/data_batch_1-00005",
        "train/airplane/data_batch_2-00000",
        "test/airplane/test_batch-00002",
        "train/automobile/data_batch_1-00004",
        "train/automobile/data_batch_2-00003",
        "test/bird/test_batch-00004",
        "train/cat/data_batch_1-00000",
        "train/cat/data_batch_1-00003",
    ]


def test_fine_labels_of_cifar_100_count(tmp_path: Path) -> None:
    names = [f"class{number:02d}" for number in range(12)]
    train, test = (random_pixels(7), [11, 4, 5, 0, 5, 9, 1]), (random_pixels(2, seed=9), [0, 11])
    path = write_tar(tmp_path / "cifar-100-binary.tar.gz", cifar100(train, test, names))
    source = open_cifar_archive(path, "cifar-100-binary", tmp_path / "scratch")
    assert source.classes == names
    assert source.labels.tolist() == sorted([*train[1], *test[1]])
    np.testing.assert_array_equal(next(iter(source.part(8, 9))), test[0][1])
    assert source.paths[7:] == ["train/class11/train-00000", "test/class11/test-00001"]


def test_folder_and_plain_tar_hold_the_same_images_as_the_archive(tmp_path: Path) -> None:
    source = _opened(tmp_path)
    root = write_files(tmp_path / "folder", FILES)
    plain = open_cifar_archive(write_tar(tmp_path / "cifar.tar", FILES), "cifar", tmp_path / "scratch")
    for other in (open_cifar_folder(root, "x"), open_cifar_folder(root / PREFIX, "x"), plain):
        assert other.paths == source.paths
        np.testing.assert_array_equal(list(other.part(3, 12)), list(source.part(3, 12)))
    assert is_cifar_folder(root)
    assert is_cifar_folder(root / PREFIX)
    assert not is_cifar_folder(tmp_path)


def test_part_is_small_and_read_by_another_process(tmp_path: Path) -> None:
    content = pickle.dumps(_opened(tmp_path).part(4, 6))
    assert len(content) < 2000
    code = (
        "import pickle, sys, hashlib\n"
        "for pixels in pickle.load(sys.stdin.buffer): print(hashlib.sha256(pixels.tobytes()).hexdigest())"
    )
    output = subprocess.run([sys.executable, "-c", code], input=content, stdout=subprocess.PIPE, check=True).stdout
    expected = [BATCHES[0][0][4], BATCHES[1][0][3]]
    assert output.decode().split() == [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in expected]


def test_archive_is_unpacked_once_and_again_when_it_changed(tmp_path: Path) -> None:
    first = _opened(tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    (unpacked,) = (tmp_path / "scratch").iterdir()
    inode = (unpacked / "test_batch.bin").stat().st_ino
    assert open_cifar_archive(archive, "x", tmp_path / "scratch").identity == first.identity
    assert (unpacked / "test_batch.bin").stat().st_ino == inode
    assert sorted(file.name for file in unpacked.iterdir()) == [
        "batches.meta.txt",
        "data_batch_1.bin",
        "data_batch_2.bin",
        "test_batch.bin",
    ]
    changed = _opened(tmp_path, cifar10(BATCHES[:1], HELD_OUT))
    assert changed.identity != first.identity
    assert len(changed.paths) == 11


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/evil", f"{PREFIX}/../../evil"])
def test_names_that_reach_outside_are_refused(tmp_path: Path, name: str) -> None:
    message = _refused(tmp_path, FILES | {name: b"x"})
    assert f"member {name!r} reaches outside the archive" in message
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo(f"{PREFIX}/data_batch_3.bin")
    entry.type, entry.linkname = kind, "/etc/passwd"
    assert f"'{PREFIX}/data_batch_3.bin' is a link or a device" in _refused(tmp_path, others=(entry,))


def test_pickled_version_is_refused_with_a_pointer_to_the_binary_one(tmp_path: Path) -> None:
    pickled = {"cifar-10-batches-py/data_batch_1": b"\x80\x02.", "cifar-10-batches-py/batches.meta": b"\x80\x02."}
    assert "expected the binary version, cifar-10-binary.tar.gz" in _refused(tmp_path, pickled)
    root = write_files(tmp_path / "folder", pickled)
    for path in (root, root / "cifar-10-batches-py"):
        assert is_cifar_folder(path)
        with pytest.raises(InputError, match=r"pickled.*cifar-10-binary\.tar\.gz"):
            open_cifar_folder(path, "x")
    root = write_files(tmp_path / "hundred", {"cifar-100-python/train": b"\x80\x02.", "cifar-100-python/meta": b"."})
    assert is_cifar_folder(root)
    with pytest.raises(InputError, match=r"cifar-100-binary\.tar\.gz"):
        open_cifar_folder(root, "x")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -600, -3])
def test_archive_cut_off_anywhere_is_refused(tmp_path: Path, keep: float) -> None:
    path = write_tar(tmp_path / "whole.tar.gz", FILES)
    content = path.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(InputError, match=r"cut\.tar\.gz: no tar file that can be read, or not all of one"):
        open_cifar_archive(cut, "x", tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_archive_whose_bytes_were_damaged_is_refused(tmp_path: Path) -> None:
    # Stored, not compressed: only the checksum at the end can tell.
    path = write_tar(tmp_path / "cifar.tar", FILES)
    content = bytearray(gzip.compress(path.read_bytes(), 0))
    content[len(content) // 2] ^= 1
    (tmp_path / "cifar.tar.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"not all of one: CRC check failed"):
        open_cifar_archive(tmp_path / "cifar.tar.gz", "x", tmp_path / "scratch")


def test_what_is_missing_wrong_or_cut_off_is_named(tmp_path: Path) -> None:
    test, first, names = (f"{PREFIX}/{file}" for file in ("test_batch.bin", "data_batch_1.bin", "batches.meta.txt"))

    def without(*keys: str) -> dict[str, bytes]:
        return {file: content for file, content in FILES.items() if file not in keys}

    assert f"{test} is missing" in _refused(tmp_path, without(test))
    assert "data_batch_1.bin is missing" in _refused(tmp_path, without(first, f"{PREFIX}/data_batch_2.bin"))
    assert "batches.meta.txt: missing" in _refused(tmp_path, without(names))
    assert "no CIFAR batches in it" in _refused(tmp_path, {"notes.txt": b"x"})
    assert "record 5 is cut off" in _refused(tmp_path, FILES | {first: FILES[first][:-1]})
    assert "data_batch_1.bin: 0 bytes" in _refused(tmp_path, FILES | {first: b""})
    assert "record 2: label 9; expected 0 to 8" in _refused(tmp_path, cifar10(BATCHES, HELD_OUT, CIFAR10_NAMES[:9]))
    assert "different names" in _refused(tmp_path, FILES | {names: b"cat\ncat\n"})
    assert "cannot be read" in _refused(tmp_path, FILES | {names: b"caf\xe9\n"})
    both = FILES | cifar100((random_pixels(1), [0]), (random_pixels(1), [0]), ["x"])
    assert "CIFAR-10 and CIFAR-100 in it" in _refused(tmp_path, both)


def test_member_that_does_not_fit_the_disk_is_refused_before_it_fills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    message = _refused(tmp_path)
    assert f"member {PREFIX}/data_batch_1.bin: 18,438 bytes have to be unpacked to " in message
    assert message.endswith("which has 10,000 left")


def test_disk_that_fills_meanwhile_is_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "the disk is full: No space left on device" in _refused(tmp_path)


def test_batch_that_shrinks_or_vanishes_after_it_was_listed_is_an_error_not_a_crash(tmp_path: Path) -> None:
    root = write_files(tmp_path, FILES)
    part = open_cifar_folder(root, "x").part(0, 15)
    (root / PREFIX / "data_batch_2.bin").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"data_batch_2\.bin: record 0: cut off"):
        list(part)
    (root / PREFIX / "data_batch_2.bin").unlink()
    with pytest.raises(InputError, match=r"data_batch_2\.bin: cannot be read: No such file"):
        list(part)
