"""Folders: what is listed, in which order, and what is refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darkroom.data.images import Unreadable
from darkroom.data.sources import TEST, open_source
from darkroom.data.sources.folder import open_folder
from darkroom.errors import InputError
from darkroom.params import DataParams

Make = Callable[..., DataParams]


def test_folder_is_sorted_and_leaves_other_files_out(folder: Path) -> None:
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / "ant" / ".hidden.png").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    (folder / ".git").mkdir()
    (folder / "bee" / "deeper").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "bee" / "deeper" / "PHOTO.JPG")
    source = open_folder(folder, "animals")
    assert source.classes == ["ant", "bee", "cow"]
    assert np.bincount(source.labels).tolist() == [8, 11, 12]
    assert source.paths == sorted(source.paths)
    assert "bee/deeper/PHOTO.JPG" in source.paths
    assert source.splits is None


def test_a_part_travels_to_another_process_and_gives_the_files_bytes(folder: Path) -> None:
    source = open_folder(folder, "animals")
    part = pickle.loads(pickle.dumps(source.part(7, 10)))
    assert list(part) == [(folder / path).read_bytes() for path in source.paths[7:10]]


def test_order_is_that_of_directories_not_of_whole_paths(folder: Path) -> None:
    for name in ("a-b", "a"):
        (folder / "ant" / name).mkdir()
        (folder / "ant" / "00.png").rename(folder / "ant" / name / "00.png")
        (folder / "ant" / "01.png").rename(folder / "ant" / "00.png")
        (folder / "ant" / "02.png").rename(folder / "ant" / "01.png") if name == "a-b" else None
    listed = open_folder(folder, "animals").paths
    assert listed.index("ant/a/00.png") < listed.index("ant/a-b/00.png")


def test_directories_of_a_split_are_a_split(folder: Path) -> None:
    root = folder.parent / "splits"
    (root / "val").mkdir(parents=True)
    (root / "val" / "bee").mkdir()
    (folder / "bee" / "09.png").rename(root / "val" / "bee" / "09.png")
    folder.rename(root / "train")
    source = open_folder(root, "splits")
    assert source.classes == ["ant", "bee", "cow"]
    assert source.splits is not None
    assert [source.paths[i] for i in np.flatnonzero(source.splits == TEST)] == ["val/bee/09.png"]
    assert (np.diff(source.labels) >= 0).all()


def test_folder_without_class_directories_is_unlabelled(folder: Path) -> None:
    source = open_folder(folder / "ant", "ant")
    assert source.classes == []
    assert source.labels.tolist() == [0] * 8


@pytest.mark.parametrize("change", ["touch", "grow", "rename", "remove"])
def test_identity_is_new_when_an_image_may_be(folder: Path, change: str) -> None:
    before = open_folder(folder, "animals").identity
    assert open_folder(folder, "animals").identity == before
    file = folder / "bee" / "03.png"
    if change == "touch":
        os.utime(file, (1, 1))
    elif change == "grow":
        content, status = file.read_bytes(), file.stat()
        file.write_bytes(content + b"x")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "rename":
        file.rename(folder / "bee" / "3.png")
    else:
        file.unlink()
    assert open_folder(folder, "animals").identity != before


def test_relative_folder_is_below_the_workspace_root(folder: Path, data_params: Make) -> None:
    nowhere = Path("/nowhere")
    assert len(open_source(data_params(), folder.parent, nowhere, nowhere).paths) == 30
    assert len(open_source(data_params(source=str(folder)), nowhere, nowhere, nowhere).paths) == 30


def test_refusals_name_what_is_wrong(folder: Path, data_params: Make) -> None:
    root = folder.parent

    def refused(**changes: object) -> str:
        with pytest.raises(InputError) as error:
            open_source(data_params(**changes), root, root / "raw", root / "scratch")
        return str(error.value)

    assert refused(source="nowhere") == f"{root}/nowhere: no such file or folder; data.source in params.yaml names it"
    assert refused(num_classes=12) == "params.yaml: data.num_classes = 12: source animals has 3 classes"
    assert refused(source="animals/ant") == (
        "params.yaml: data.num_classes = 3: source animals/ant is unlabelled: expected 0"
    )
    assert "has no split of its own" in refused(test_fraction=None)
    assert "unknown scheme gs://" in refused(source="gs://bucket/animals")
    assert "expected s3://bucket/prefix" in refused(source="s3://UPPER/x")
    assert "no known form" in refused(source="animals/ant/00.png")
    assert "data.checksum" in refused(checksum="md5:" + "0" * 32)
    (root / "empty").mkdir()
    assert "no images" in refused(source="empty")
    (folder / "dog").mkdir()
    assert refused(num_classes=4).startswith(f"{folder}/dog: class directory without images")
    (folder / "dog").rmdir()
    (folder / "stray.png").write_bytes(b"x")
    assert "1 images beside the class directories, stray.png for one, have no label" in refused()


def test_classes_whose_names_are_spelt_alike_are_refused(folder: Path, data_params: Make) -> None:
    (folder / "ant").rename(folder / "\\xe9")
    (folder / "bee").rename(os.fsdecode(os.fsencode(folder) + b"/\xe9"))
    with pytest.raises(InputError, match="is the name of several classes; rename one"):
        open_source(data_params(), folder.parent, folder.parent / "raw", folder.parent / "scratch")


def test_what_cannot_be_read_is_a_reason_and_stops_no_other(folder: Path) -> None:
    source = open_folder(folder, "animals")
    (folder / "ant" / "00.png").unlink()
    (folder / "ant" / "01.png").unlink()
    os.mkfifo(folder / "ant" / "01.png")
    gone, pipe, whole = source.part(0, 3)
    assert gone == Unreadable("cannot be read: No such file or directory")
    assert pipe == Unreadable("not a regular file")
    assert whole == (folder / "ant" / "02.png").read_bytes()


def test_links_that_lead_nowhere_or_in_a_circle(folder: Path) -> None:
    (folder / "ant" / "loop.png").symlink_to("loop.png")
    source = open_folder(folder, "animals")
    (content,) = source.part(8, 9)
    assert content == Unreadable("cannot be read: Too many levels of symbolic links")
    (folder / "ant" / "loop.png").unlink()

    (folder / "ant" / "up").symlink_to("..")
    with pytest.raises(InputError, match=r"ant/up.*: a link to a directory that it lies in"):
        open_folder(folder, "animals")
    (folder / "ant" / "up").unlink()

    (folder / "dog").symlink_to("nowhere")
    with pytest.raises(InputError, match="dog: a link that leads nowhere"):
        open_folder(folder, "animals")
    (folder / "dog").unlink()

    elsewhere = folder.parent / "elsewhere"
    (folder / "cow").rename(elsewhere)
    (folder / "cow").symlink_to(elsewhere)
    assert len(open_folder(folder, "animals").paths) == 30
