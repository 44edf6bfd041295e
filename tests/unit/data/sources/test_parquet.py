"""Parquet files as the hub lays them out."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from darkroom.data.images import Unreadable
from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.parquet import open_parquet
from darkroom.errors import InputError
from tests.archives import hub_features, png, random_pixels, write_parquet

NAMES = ["ant", "bee", "cow"]
IMAGES = [png(pixels) for pixels in random_pixels(23, 6)]
LABELS = [(7 * row) % 3 for row in range(23)]
TRAIN_0, TRAIN_1, HELD_OUT = slice(0, 10), slice(10, 17), slice(17, 23)


def _dataset(root: Path, row_group: int = 4) -> Path:
    files = {"train-00000-of-00002": TRAIN_0, "train-00001-of-00002": TRAIN_1, "validation-00000-of-00001": HELD_OUT}
    for name, rows in files.items():
        write_parquet(root / "data" / f"{name}.parquet", IMAGES[rows], LABELS[rows], hub_features(NAMES), row_group)
    return root


def _opened(root: Path) -> Source:
    return open_parquet(root, sorted(root.rglob("*.parquet")), "animals")


def _refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_parquet(path, [path], "x")
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_images_labels_and_splits_are_what_was_put_in_in_the_order_of_the_rows(tmp_path: Path) -> None:
    source = _opened(_dataset(tmp_path))
    assert source.classes == NAMES
    assert source.labels.tolist() == LABELS
    assert source.splits is not None
    assert source.splits.tolist() == [TRAIN] * 17 + [TEST] * 6
    assert list(source.part(0, 23)) == IMAGES
    assert source.paths[9:11] == [
        "data/train-00000-of-00002.parquet/000009",
        "data/train-00001-of-00002.parquet/000000",
    ]
    assert len(set(source.paths)) == 23


@pytest.mark.parametrize("row_group", [1, 4, 100])
def test_every_part_is_that_part_of_the_whole(tmp_path: Path, row_group: int) -> None:
    source = _opened(_dataset(tmp_path, row_group))
    for start in range(0, 23, 2):
        for stop in range(start, 24, 3):
            assert list(source.part(start, stop)) == IMAGES[start:stop]


def test_row_group_is_not_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES, LABELS, hub_features(NAMES))
    sizes = []
    original = pq.ParquetFile.iter_batches

    def counted(*args: object, **named: object) -> object:
        for batch in original(*args, **named):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr("darkroom.data.sources.parquet._BATCH_BYTES", 4 * len(IMAGES[0]))
    assert list(open_parquet(path, [path], "x").part(8, 12)) == IMAGES[8:12]
    assert max(sizes) <= 5
    assert sum(sizes) <= 16  # what comes after the part is not read


def test_part_is_small_and_reads_the_same_after_pickling(tmp_path: Path) -> None:
    content = pickle.dumps(_opened(_dataset(tmp_path)).part(8, 19))
    assert len(content) < 2000
    assert list(pickle.loads(content)) == IMAGES[8:19]


def test_identity_is_new_when_a_file_is(tmp_path: Path) -> None:
    first = _opened(_dataset(tmp_path)).identity
    assert _opened(tmp_path).identity == first
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", IMAGES[:9], LABELS[:9], hub_features(NAMES))
    assert _opened(tmp_path).identity != first


def test_columns_are_found_by_what_they_are_called_or_described_as(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"

    def classes(columns: tuple[str, str], features: dict[str, object] | None) -> list[str]:
        write_parquet(path, IMAGES, LABELS, features, columns=columns)
        source = open_parquet(path, [path], "x")
        assert list(source.part(5, 7)) == IMAGES[5:7]
        return source.classes

    assert classes(("photo", "kind"), hub_features(NAMES, "photo", "kind")) == NAMES
    assert classes(("img", "fine_label"), hub_features(NAMES, "img", "fine_label")) == NAMES
    assert classes(("img", "label"), None) == ["0", "1", "2"]
    assert classes(("image", "fine_label"), None) == ["0", "1", "2"]
    assert classes(("image", "caption_length"), hub_features(None)) == []


def test_fine_labels_are_taken_before_coarse_ones(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES, LABELS, hub_features(NAMES, label="fine_label"),
                         columns=("image", "fine_label"))  # fmt: skip
    table = pq.read_table(path).append_column("coarse_label", pa.array([0] * 23))
    coarse = {"coarse_label": {"_type": "ClassLabel", "names": ["animal"]}}
    metadata = {"info": {"features": hub_features(NAMES, label="fine_label") | coarse}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)
    assert open_parquet(path, [path], "x").classes == NAMES


def test_plain_columns_of_bytes_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array(IMAGES, pa.large_binary()), "label": LABELS}), path)
    assert list(open_parquet(path, [path], "x").part(3, 9)) == IMAGES[3:9]


def test_without_a_column_of_labels_the_images_are_unlabelled(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", IMAGES, None, hub_features(None))
    source = open_parquet(path, [path], "x")
    assert (source.classes, source.splits) == ([], None)
    assert source.labels.tolist() == [0] * 23
    assert source.paths[1] == "train.parquet/000001"


def test_a_file_whose_name_says_no_split_leaves_the_whole_without_one(tmp_path: Path) -> None:
    write_parquet(_dataset(tmp_path) / "data" / "training.parquet", IMAGES, LABELS, hub_features(NAMES))
    assert _opened(tmp_path).splits is None


def test_rows_without_bytes_are_unreadable_images(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [IMAGES[0], None, b"", IMAGES[3]], [0, 1, 2, 0], hub_features(NAMES))
    contents = list(open_parquet(path, [path], "x").part(0, 4))
    assert contents == [IMAGES[0], Unreadable("no bytes in the row: null, or a path alone"), b"", IMAGES[3]]
    table = pq.read_table(path)
    column = pa.array([None, {"bytes": IMAGES[1], "path": None}], table.schema.field("image").type)
    pq.write_table(pa.table({"image": column, "label": [0, 1]}), path)
    contents = list(open_parquet(path, [path], "x").part(0, 2))
    assert isinstance(contents[0], Unreadable)
    assert contents[1] == IMAGES[1]


def test_labels_that_are_null_or_have_no_class_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    hub = hub_features(NAMES)
    write_parquet(path, IMAGES[:4], [0, 1, None, None], hub)
    assert "column label, row 2: null" in _refused(path)
    write_parquet(path, IMAGES[:4], [0, 3, 1, 2], hub)
    assert "column label, row 1: label 3; expected 0 to 2" in _refused(path)
    write_parquet(path, IMAGES[:4], [0, 1, 1, -1], hub)
    assert "column label, row 3: label -1; expected 0 to 2" in _refused(path)
    write_parquet(path, IMAGES[:4], [0, 1, -1, 0], None)
    assert "row 2: label -1; expected numbers from 0" in _refused(path)
    write_parquet(path, IMAGES[:4], [0, 1, 10**9, 0], None)
    assert "label 1000000000 among 4 images" in _refused(path)


def test_columns_that_are_missing_or_of_another_type_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, IMAGES, LABELS, None, columns=("picture", "label"))
    assert "no column of images; expected image or img among picture, label" in _refused(path)
    write_parquet(path, IMAGES, None, hub_features(NAMES))
    assert "no column label, which its metadata describes" in _refused(path)
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), path)
    assert "column image is string; expected bytes" in _refused(path)
    pq.write_table(pa.table({"image": IMAGES[:2], "label": ["ant", "bee"]}), path)
    assert "column label is string; expected whole numbers" in _refused(path)
    write_parquet(path, IMAGES, LABELS, hub_features(["ant", "ant", "bee"]))
    assert "expected a list of different names" in _refused(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": "{"}), path)
    assert "metadata huggingface of the schema" in _refused(path)
    write_parquet(path, [], [], hub_features(NAMES))
    assert "no rows" in _refused(path)


def test_files_that_differ_in_their_classes_are_refused(tmp_path: Path) -> None:
    _dataset(tmp_path)
    path = tmp_path / "data" / "validation-00000-of-00001.parquet"
    write_parquet(path, IMAGES, LABELS, hub_features(["cow", "bee", "ant"]))
    with pytest.raises(InputError, match=r"validation-.*columns or classes are not those of train-00000-of-00002"):
        _opened(tmp_path)


def test_files_that_are_cut_off_or_no_parquet_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES, LABELS, hub_features(NAMES))
    content = path.read_bytes()
    for damaged in (b"", content[:200], content[: len(content) // 2], content[:-3], b"PK" * 100):
        path.write_bytes(damaged)
        assert "no Parquet file that can be read, or not all of one" in _refused(path)


def test_damage_found_while_reading_is_refused_with_the_file_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES, LABELS, hub_features(NAMES))
    source = open_parquet(path, [path], "x")
    content = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    path.write_bytes(content[:start] + b"\xff" * 64 + content[start + 64 :])
    with pytest.raises(InputError, match=r"x\.parquet: no Parquet file that can be read, or not all of one"):
        list(source.part(0, 23))
    path.unlink()
    with pytest.raises(InputError, match=r"x\.parquet: .*No such file"):
        list(source.part(0, 23))


def test_file_that_lost_rows_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES, LABELS, hub_features(NAMES))
    source = open_parquet(path, [path], "x")
    write_parquet(path, IMAGES[:9], LABELS[:9], hub_features(NAMES))
    with pytest.raises(InputError, match="ends after row 9; it had 23 rows"):
        list(source.part(5, 23))


def test_paths_and_labels_are_numpy_and_text(tmp_path: Path) -> None:
    source = _opened(_dataset(tmp_path))
    assert source.labels.dtype == np.int32
    assert source.splits is not None
    assert source.splits.dtype == np.uint8
