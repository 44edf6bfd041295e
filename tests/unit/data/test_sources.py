"""Digits and folders, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from darkroom.data.sources import open_source
from darkroom.data.sources.digits import Digits
from darkroom.data.sources.folder import Folder
from darkroom.errors import InputError
from darkroom.params import DataParams

Make = Callable[..., DataParams]


def test_digits_are_the_librarys_1797_scans() -> None:
    source, bunch = Digits(8, 1), load_digits()
    assert len(source.paths) == len(set(source.paths)) == 1797
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    for index in (0, 500, 1796):
        scan = int(source.paths[index].rpartition("/")[2])
        assert source.labels[index] == bunch.target[scan]
        pixels = source.read(index).pixels
        assert pixels is not None
        assert pixels.shape == (1, 8, 8)
        # A level of 0..16 is found again from 0..255 without loss.
        np.testing.assert_array_equal(np.round(pixels[0] * (16 / 255)), bunch.images[scan])
        assert np.abs(pixels[0] - bunch.images[scan] * 255 / 16).max() <= 0.5


def test_digits_at_another_size_are_pillows_resize() -> None:
    native, large = Digits(8, 1).read(7).pixels, Digits(16, 1).read(7).pixels
    assert native is not None
    expected = Image.fromarray(native[0]).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(large, np.asarray(expected)[None])


def test_folder_is_sorted_and_leaves_other_files_out(folder: Path) -> None:
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / "ant" / ".hidden.png").write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / "bee" / "deeper").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "bee" / "deeper" / "PHOTO.JPG")
    source = Folder(folder, 8, 1)
    assert source.name == "photos"
    assert source.classes == ["ant", "bee", "cow"]
    assert np.bincount(source.labels).tolist() == [8, 11, 12]
    assert source.paths == sorted(source.paths)
    assert "bee/deeper/PHOTO.JPG" in source.paths


def test_relative_folder_is_below_the_workspace_root(folder: Path, data_params: Make) -> None:
    assert len(open_source(data_params(), folder.parent, folder.parent / "raw").paths) == 30
    elsewhere = data_params(source=str(folder))
    assert len(open_source(elsewhere, Path("/nowhere"), Path("/nowhere")).paths) == 30


def test_refusals_name_what_is_wrong(folder: Path, data_params: Make) -> None:
    root = folder.parent

    def refused(**changes: object) -> str:
        with pytest.raises(InputError) as error:
            open_source(data_params(**changes), root, root / "raw")
        return str(error.value)

    assert refused(source="nowhere") == f"{root}/nowhere: no such folder; data.source in params.yaml names it"
    assert refused(num_classes=12) == "params.yaml: data.num_classes = 12: source photos has 3 classes"
    assert "unknown scheme gs://" in refused(source="gs://bucket/photos")
    assert "expected s3://bucket/prefix" in refused(source="s3://UPPER/x")
    assert "not a folder" in refused(source="photos/ant/00.png")
    (root / "empty").mkdir()
    assert "no class directories" in refused(source="empty")
    (folder / "dog").mkdir()
    assert refused(num_classes=4).startswith(f"{folder}/dog: class directory without images")


def test_file_that_cannot_be_read_is_an_error_not_a_bad_image(folder: Path) -> None:
    source = Folder(folder, 8, 1)
    (folder / "ant" / "00.png").unlink()
    with pytest.raises(InputError, match=r"ant/00\.png: cannot be read: No such file"):
        source.read(0)
