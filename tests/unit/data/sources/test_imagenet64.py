"""Downsampled ImageNet's npz batches."""

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.imagenet64 import open_imagenet64
from darkroom.errors import InputError
from tests.archives import planar, random_pixels, write_imagenet64

SIDE = 8
BATCHES = [
    (random_pixels(5, SIDE, seed=1), [2, 1, 3, 2, 1]),
    (random_pixels(4, SIDE, seed=2), [3, 3, 1, 2]),
]
HELD_OUT = (random_pixels(3, SIDE, seed=3), [1, 3, 2])
NAMES = ["tench", "kit_fox", "crane"]


class Trap:
    """A pickle of it makes a file in the working directory when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("sprung"),)


def _opened(root: Path) -> Source:
    return open_imagenet64(root, sorted(root.glob("*_data*.npz")), "imagenet64", root.parent / "scratch")


def _refused(root: Path) -> str:
    with pytest.raises(InputError) as error:
        _opened(root)
    return str(error.value)


def _damaged(tmp_path: Path, **arrays: object) -> str:
    """What is said about a first batch with other arrays."""
    root = write_imagenet64(tmp_path / "damaged", BATCHES, HELD_OUT)
    data = {"data": planar(BATCHES[0][0]), "labels": np.array(BATCHES[0][1])} | arrays
    present = {key: value for key, value in data.items() if value is not None}
    np.savez(root / "train_data_batch_1.npz", **present)  # type: ignore[arg-type]
    message = _refused(root)
    assert f"{root}/train_data_batch_1.npz" in message
    return message


@pytest.mark.parametrize("compressed", [False, True])
def test_pixels_labels_and_splits_are_what_was_put_in(tmp_path: Path, compressed: bool) -> None:
    source = _opened(write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT, NAMES, compressed))
    given = {"train_data_batch_1": BATCHES[0], "train_data_batch_2": BATCHES[1], "val_data": HELD_OUT}
    assert source.classes == NAMES
    assert source.form == "ImageNet 8x8 batches"
    assert source.splits is not None
    assert len(set(source.paths)) == 12
    contents = list(source.part(0, 12))
    for path, label, split, content in zip(source.paths, source.labels, source.splits, contents, strict=True):
        part, class_name, place = path.split("/")
        stem, _, row = place.rpartition("-")
        assert part == {TRAIN: "train", TEST: "test"}[int(split)]
        assert (part == "test") == (stem == "val_data")
        assert class_name == NAMES[label]
        assert given[stem][1][int(row)] == label + 1
        np.testing.assert_array_equal(content, given[stem][0][int(row)])
    assert (tmp_path / "scratch").exists() == compressed


def test_order_is_by_label_then_batch_number_then_row(tmp_path: Path) -> None:
    batches = [(random_pixels(2, SIDE, seed=number), [2, 1]) for number in range(10)]
    source = _opened(write_imagenet64(tmp_path / "x", batches, HELD_OUT))
    assert source.classes == ["1", "2", "3"]
    assert source.labels.tolist() == [0] * 11 + [1] * 11 + [2]
    assert source.paths[:11] == [
        *(f"train/1/train_data_batch_{number}-00001" for number in range(1, 11)),
        "test/1/val_data-00000",
    ]


def test_part_is_small_and_reads_the_same_after_pickling(tmp_path: Path) -> None:
    source = _opened(write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT))
    content = pickle.dumps(source.part(3, 8))
    assert len(content) < 2000
    np.testing.assert_array_equal(list(pickle.loads(content)), list(source.part(0, 12))[3:8])


def test_compressed_arrays_are_unpacked_once_and_identity_follows_the_files(tmp_path: Path) -> None:
    root = write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT, compressed=True)
    first = _opened(root)
    unpacked = {file.name: file.stat().st_ino for file in (tmp_path / "scratch").iterdir()}
    assert len(unpacked) == 3
    assert _opened(root).identity == first.identity
    assert {file.name: file.stat().st_ino for file in (tmp_path / "scratch").iterdir()} == unpacked
    write_imagenet64(root, [(random_pixels(6, SIDE), [1] * 6)], None, compressed=True)
    assert _opened(root).identity != first.identity
    (root / "map_clsloc.txt").write_text("n1 1 a\nn2 2 b\nn3 3 c\n")
    assert _opened(root).classes == ["a", "b", "c"]


def test_classes_that_share_a_name_are_told_apart_by_their_synset(tmp_path: Path) -> None:
    root = write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT, ["crane", "tench", "crane"])
    assert _opened(root).classes == ["crane (n00000001)", "tench", "crane (n00000003)"]


def test_without_held_out_images_there_is_no_split(tmp_path: Path) -> None:
    assert _opened(write_imagenet64(tmp_path / "x", BATCHES, None)).splits is None


def test_pickled_arrays_are_refused_and_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trap = np.array([Trap()] * 5, dtype=object)
    assert "data: a pickled array; refused" in _damaged(tmp_path, data=trap)
    assert "labels: no npy array that can be read, or a pickled one" in _damaged(tmp_path, labels=trap)
    (tmp_path / "damaged" / "train_data_batch_1.npz").write_bytes(pickle.dumps(Trap()))
    assert "no zip file that can be read" in _refused(tmp_path / "damaged")
    assert not (tmp_path / "sprung").exists()


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data, labels = planar(BATCHES[0][0]), np.array(BATCHES[0][1])
    assert "no array 'labels'" in _damaged(tmp_path, labels=None)
    assert "no array 'data'" in _damaged(tmp_path, data=None)
    assert "shape (5, 191); expected (images, 3 * side * side)" in _damaged(tmp_path, data=data[:, 1:])
    assert "shape (0, 192)" in _damaged(tmp_path, data=data[:0], labels=labels[:0])
    assert "float64 of shape (5, 192)" in _damaged(tmp_path, data=data / 255)
    assert "uint8 of shape (5, 3, 8, 8)" in _damaged(tmp_path, data=data.reshape(5, 3, 8, 8))
    assert "column by column" in _damaged(tmp_path, data=np.asfortranarray(data))
    assert "int64 of shape (4,); data has 5 images" in _damaged(tmp_path, labels=labels[:4])
    assert "labels: float64 of shape (5,)" in _damaged(tmp_path, labels=labels / 1.0)
    assert "labels, row 2: 0; expected 1 to 3" in _damaged(tmp_path, labels=labels * [1, 1, 0, 1, 1])
    assert "images of 4x4 pixels; train_data_batch_1.npz has 8x8" in _other_size(tmp_path)


def _other_size(tmp_path: Path) -> str:
    return _refused(write_imagenet64(tmp_path / "sizes", [BATCHES[0], (random_pixels(1, 4), [1])], None))


def test_labels_beyond_the_named_classes_are_refused(tmp_path: Path) -> None:
    root = write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT, NAMES[:2])
    assert _refused(root) == f"{root}/train_data_batch_1.npz: labels, row 2: 3; expected 1 to 2"
    (root / "map_clsloc.txt").write_text("n1 1 a\nn2 3 b\n")
    assert "expected the numbers 1 to 2, each once" in _refused(root)
    (root / "map_clsloc.txt").write_text("1 a\n")
    assert 'expected lines like "n02119789 1 kit_fox"' in _refused(root)
    np.savez(root / "val_data.npz", data=planar(HELD_OUT[0]), labels=np.array([1, 2, 10**9]))
    (root / "map_clsloc.txt").unlink()
    assert "label 1000000000 among 12 images" in _refused(root)


def test_files_that_are_cut_off_or_of_another_name_are_refused(tmp_path: Path) -> None:
    root = write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT)
    path = root / "train_data_batch_2.npz"
    content = path.read_bytes()
    for cut in (0, 100, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:cut])
        assert f"{path}: no zip file" in _refused(root)
    path.write_bytes(content)
    path.rename(root / "more_data.npz")
    assert "more_data.npz: unknown batch; expected train_data_batch_1.npz … and val_data.npz" in _refused(root)


def test_members_whose_bytes_were_damaged_are_refused(tmp_path: Path) -> None:
    """Labels always; pixels when they are unpacked. Those read in place are not summed: that would read all twice."""
    stored = write_imagenet64(tmp_path / "stored", BATCHES, HELD_OUT)
    _damage(stored / "train_data_batch_1.npz", "labels.npy")
    assert f"{stored}/train_data_batch_1.npz: labels: damaged: wrong checksum" in _refused(stored)
    packed = write_imagenet64(tmp_path / "packed", [(random_pixels(40, 64), [1] * 40)], None, compressed=True)
    _damage(packed / "train_data_batch_1.npz", "data.npy")
    assert f"{packed}/train_data_batch_1.npz: data: damaged: Bad CRC-32" in _refused(packed)
    assert list((tmp_path / "scratch").iterdir()) == []


def _damage(path: Path, name: str) -> None:
    """Change a byte near the end of a member; random pixels are stored by deflate too, so only a checksum can tell."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
    content[member.header_offset + 30 + len(name) + 20 + member.compress_size - 9] ^= 0xFF
    path.write_bytes(content)


def test_array_that_does_not_fit_the_disk_is_refused_before_it_fills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_imagenet64(tmp_path / "x", BATCHES, HELD_OUT, compressed=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    assert f"{root}/train_data_batch_1.npz: data: 1,088 bytes have to be unpacked" in _refused(root)
    assert list((tmp_path / "scratch").iterdir()) == []
