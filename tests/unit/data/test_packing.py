"""The packed data set: what it holds, that it is repeatable, and that it is never half there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from darkroom.data.dataset import DatasetInfo, load_info, load_split
from darkroom.data.images import Picture
from darkroom.data.packing import pack, replacing_directory
from darkroom.data.sources import open_source
from darkroom.data.sources.folder import Folder
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.params import DataParams

Make = Callable[..., DataParams]
FILES = {
    "dataset.json",
    "manifest.parquet",
    "train_images.npy",
    "train_labels.npy",
    "test_images.npy",
    "test_labels.npy",
}


def prepare(root: Path, params: DataParams, name: str = "prepared") -> tuple[DatasetInfo, Path]:
    prepared = root / name
    return pack(open_source(params, root, root / "raw"), params, prepared), prepared


def contents(directory: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in directory.iterdir()}


def test_packed_arrays_are_the_decoded_images_in_the_manifests_order(folder: Path, data_params: Make) -> None:
    info, prepared = prepare(folder.parent, data_params())
    assert {path.name for path in prepared.iterdir()} == FILES
    assert load_info(prepared) == info
    assert info.splits == {"train": 22, "test": 8}  # 2 of 8, 3 (2.5 rounded up) of 10, 3 of 12
    rows = pq.read_table(prepared / "manifest.parquet").to_pylist()
    source = Folder(folder, 8, 1)
    assert [row["path"] for row in rows] == source.paths
    for split in ("train", "test"):
        packed = load_split(prepared, split)
        own = [i for i, row in enumerate(rows) if row["split"] == split]
        assert packed.labels.tolist() == [rows[i]["label"] for i in own]
        assert isinstance(packed.images, np.memmap)
        assert packed.images.dtype == np.uint8
        for position, i in enumerate(own):
            np.testing.assert_array_equal(packed.images[position], source.read(i).pixels)
            assert rows[i]["mean"] == pytest.approx(packed.images[position].mean())
            assert rows[i]["std"] == pytest.approx(packed.images[position].std())
            assert rows[i]["sha256"] == digest_file(folder / rows[i]["path"])
            assert rows[i]["packed"] == "1x8x8"


def test_same_images_give_the_same_bytes(folder: Path, data_params: Make) -> None:
    first, one = prepare(folder.parent, data_params(), "one")
    for path in folder.rglob("*.png"):
        os.utime(path, (0, 0))
    second, two = prepare(folder.parent, data_params(), "two")
    assert first == second
    assert contents(one) == contents(two)


def test_digest_follows_pixels_labels_and_class_names(folder: Path, data_params: Make) -> None:
    before = prepare(folder.parent, data_params(), "a")[0].digest
    assert prepare(folder.parent, data_params(seed=1), "b")[0].digest != before
    (folder / "ant").rename(folder / "ape")
    assert prepare(folder.parent, data_params(), "c")[0].digest != before
    (folder / "ape").rename(folder / "ant")
    assert prepare(folder.parent, data_params(), "d")[0].digest == before
    Image.new("L", (16, 16), 3).save(folder / "ant" / "00.png")
    assert prepare(folder.parent, data_params(), "e")[0].digest != before


def test_bad_image_is_in_the_manifest_and_not_in_the_arrays(folder: Path, data_params: Make) -> None:
    (folder / "bee" / "03.png").write_bytes(b"no image")
    info, prepared = prepare(folder.parent, data_params())
    assert sum(info.splits.values()) == 29
    bad = [row for row in pq.read_table(prepared / "manifest.parquet").to_pylist() if not row["decoded"]]
    assert [(row["path"], row["split"], row["bytes"]) for row in bad] == [("bee/03.png", "none", 8)]
    assert "not a PNG" in bad[0]["error"]
    assert bad[0]["width"] is None
    assert bad[0]["mean"] is None


def test_class_of_bad_images_alone_is_refused_with_the_first_reason(folder: Path, data_params: Make) -> None:
    for path in (folder / "cow").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"class cow: none of its 12 images .* cow/00.png: the file is empty"):
        prepare(folder.parent, data_params())


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there_and_nothing_else(folder: Path, data_params: Make, error: BaseException) -> None:
    _, prepared = prepare(folder.parent, data_params())
    before = contents(prepared)

    class Failing(Folder):
        def read(self, index: int) -> Picture:
            if index == 20:
                raise error
            return super().read(index)

    with pytest.raises(type(error)):
        pack(Failing(folder, 8, 1), data_params(), prepared)
    assert contents(prepared) == before
    with pytest.raises(type(error)):
        pack(Failing(folder, 8, 1), data_params(), folder.parent / "fresh")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["photos", "prepared"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_half_written_output(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import signal, sys, time; from pathlib import Path; from darkroom.data.packing import replacing_directory\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "with replacing_directory(Path('out')) as directory:\n"
        "    (directory / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with replacing_directory(tmp_path / "out"):  # a second one beside it does not take the first's away
        assert len(list(tmp_path.glob(".out.*/new/half"))) == 1
        time.sleep(0)
    process.send_signal(number)
    process.wait(timeout=10)
    process.stdout.close()
    assert not (tmp_path / "out" / "half").exists()
    with replacing_directory(tmp_path / "out") as directory:
        (directory / "whole").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]
