"""Reading the packed data: garbled files are refused, and nothing heavy is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from darkroom.data.dataset import load_info, load_split
from darkroom.data.packing import pack
from darkroom.data.sources import open_source
from darkroom.errors import InputError
from darkroom.params import DataParams


@pytest.fixture
def prepared(folder: Path, data_params: Callable[..., DataParams]) -> Path:
    params, root, directory = data_params(), folder.parent, folder.parent / "prepared"
    pack(open_source(params, root, root / "raw", root / "scratch"), params, directory, root / "scratch")
    return directory


@pytest.mark.parametrize("content", [None, "{", "[]", '{"name": "x"}', b"\xff\xfe"])
def test_garbled_description_is_refused(prepared: Path, content: str | bytes | None) -> None:
    path = prepared / "dataset.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"dataset\.json: .*prepare"):
        load_info(prepared)


def test_missing_and_cut_arrays_are_refused(prepared: Path) -> None:
    images = prepared / "train_images.npy"
    images.write_bytes(images.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"train_images\.npy: cannot be read"):
        load_split(prepared, "train")
    images.unlink()
    with pytest.raises(InputError, match=r"train_images\.npy: no such file"):
        load_split(prepared, "train")
    with pytest.raises(InputError, match="no split 'validation'"):
        load_split(prepared, "validation")


def test_other_shape_type_or_labels_than_declared_are_refused(prepared: Path) -> None:
    images, labels = prepared / "test_images.npy", prepared / "test_labels.npy"
    good = np.load(images)
    for bad in (good[:-1], good.astype(np.float32), good[:, :, :4]):
        np.save(images, bad)
        with pytest.raises(InputError, match=r"test_images\.npy: .* declares uint8 of shape \(8, 1, 8, 8\)"):
            load_split(prepared, "test")
    np.save(images, good)
    np.save(labels, np.full(8, 3))
    with pytest.raises(InputError, match=r"labels from 3 to 3; .* labels 0 to 2"):
        load_split(prepared, "test")


def test_pickled_arrays_are_refused(prepared: Path) -> None:
    np.save(prepared / "test_labels.npy", np.array([{}] * 8, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"test_labels\.npy: cannot be read"):
        load_split(prepared, "test")


def test_reader_imports_neither_pandas_nor_pillow_nor_the_services() -> None:
    script = "import darkroom.data.dataset, json, sys; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    heavy = {"pandas", "pyarrow", "PIL", "sklearn", "great_expectations", "boto3", "botocore", "torch", "mlflow", "dvc"}
    assert heavy.isdisjoint(modules)


def test_unlabelled_images_have_the_label_0_and_no_other(prepared: Path) -> None:
    info = json.loads((prepared / "dataset.json").read_text())
    (prepared / "dataset.json").write_text(json.dumps(info | {"classes": []}))
    np.save(prepared / "test_labels.npy", np.zeros(8, dtype=np.int64))
    assert load_split(prepared, "test").labels.tolist() == [0] * 8
    np.save(prepared / "test_labels.npy", np.arange(8) % 2)
    with pytest.raises(InputError, match=r"labels from 0 to 1; .* declares 0 classes, labels 0 to 0"):
        load_split(prepared, "test")
