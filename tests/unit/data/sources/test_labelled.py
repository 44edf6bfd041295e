"""Zips and folders with dataset.json: the same images whatever the form, and nothing outside."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest

from darkroom.data.images import Content, Unreadable
from darkroom.data.sources import Source
from darkroom.data.sources.folder import open_folder
from darkroom.data.sources.labelled import open_labelled_folder, open_zip
from darkroom.errors import InputError


def contents(source: Source) -> list[Content]:
    return list(source.part(0, len(source.paths)))


def make_zip(folder: Path, method: int = zipfile.ZIP_STORED, **members: str | bytes) -> Path:
    path = folder.parent / "animals.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(file, file.relative_to(folder))
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def labels_of(folder: Path) -> list[list[object]]:
    classes = sorted(path.name for path in folder.iterdir())
    return [[str(f.relative_to(folder)), classes.index(f.parent.name)] for f in sorted(folder.rglob("*.png"))]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_with_class_directories_is_the_folder(folder: Path, method: int) -> None:
    expected, source = open_folder(folder, "animals"), open_zip(make_zip(folder, method), "animals")
    assert (source.classes, source.paths) == (expected.classes, expected.paths)
    assert source.labels.tolist() == expected.labels.tolist()
    assert contents(source) == contents(expected)
    assert list(pickle.loads(pickle.dumps(source.part(3, 5)))) == contents(expected)[3:5]


@pytest.mark.parametrize("named", [True, False])
def test_dataset_json_labels_a_zip_and_a_folder_alike(folder: Path, named: bool) -> None:
    value = {"labels": labels_of(folder)} | ({"classes": ["ant", "bee", "cow"]} if named else {})
    expected = open_folder(folder, "animals")
    (folder / "dataset.json").write_text(json.dumps(value))
    archive = make_zip(folder, **{"dataset.json": json.dumps(value)})
    for source in (open_zip(archive, "animals"), open_labelled_folder(folder, "animals")):
        assert source.classes == (["ant", "bee", "cow"] if named else ["0", "1", "2"])
        assert source.paths == expected.paths
        assert source.labels.tolist() == expected.labels.tolist()
        assert contents(source) == contents(expected)


def test_labels_that_are_null_are_none(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"labels": null}')
    archive = make_zip(folder, **{"dataset.json": '{"labels": null}'})
    for source in (open_zip(archive, "animals"), open_labelled_folder(folder, "animals")):
        assert source.classes == []
        assert len(source.paths) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected .*labels.* in JSON"),
        ("[1]", "expected .*labels.* in JSON"),
        ('{"labels": 3}', "labels: expected a list"),
        ('{"labels": [["ant/00.png", "ant"]]}', r"row 0: expected \[file, number from 0\], found"),
        ('{"labels": [["ant/00.png", 0], ["ant/00.png", 1]]}', "row 1: 'ant/00.png' is there twice"),
        ('{"labels": [["../x.png", 0]]}', r"row 0: '\.\./x\.png' reaches outside; refused"),
        ('{"labels": [["/etc/x.png", 0]]}', "row 0: '/etc/x.png' reaches outside; refused"),
        ('{"labels": [["ant/dog.png", 0]]}', "ant/dog.png"),
        ('{"labels": [["ant/00.png", 1]]}', "label 0 has no images|have no label"),
        ('{"labels": [["ant/00.png", 1000000000000]]}', "label 0 has no images|have no label"),
        ('{"labels": [["ant/notes.txt", 0]]}', "'ant/notes.txt' is no image"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_file_and_row(folder: Path, text: str, message: str) -> None:
    archive = make_zip(folder, **{"dataset.json": text})
    (folder / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=rf"animals\.zip: dataset\.json.*({message})"):
        open_zip(archive, "animals")
    with pytest.raises(InputError, match=rf"animals/dataset\.json.*({message})"):
        open_labelled_folder(folder, "animals")


def test_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes(b"x")
    (folder / "ant" / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "dataset.json").write_text('{"labels": [["ant/link.png", 0]]}')
    with pytest.raises(InputError, match=r"'ant/link\.png' reaches outside the folder; refused"):
        open_labelled_folder(folder, "animals")


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "ant/../../evil.png", "ant\\..\\evil.png"])
def test_member_that_reaches_outside_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"animals\.zip: member .*evil\.png.* reaches outside the archive; refused"):
        open_zip(make_zip(folder, **{name: b"x"}), "animals")
    assert not list(folder.parent.rglob("evil.png"))


def test_member_that_is_damaged_is_a_reason_and_stops_no_other(folder: Path) -> None:
    archive = make_zip(folder)
    expected = contents(open_zip(archive, "animals"))
    raw = bytearray(archive.read_bytes())
    at = raw.index(b"ant/03.png") + 60
    raw[at] ^= 0xFF
    archive.write_bytes(bytes(raw))
    found = contents(open_zip(archive, "animals"))
    assert found[3] == Unreadable("damaged: wrong checksum in the archive", len(expected[3]))  # type: ignore[arg-type]
    assert found[:3] + found[4:] == expected[:3] + expected[4:]


def test_member_that_unpacks_to_more_than_it_declares_is_cut_off(folder: Path) -> None:
    archive = make_zip(folder, zipfile.ZIP_DEFLATED, **{"ant/bomb.png": bytes(10_000_000)})
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace((10_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    source = open_zip(archive, "animals")
    bomb = contents(source)[source.paths.index("ant/bomb.png")]
    assert bomb == Unreadable("damaged: not of the size that the archive declares", 100)


@pytest.mark.parametrize("content", [b"", b"no zip at all", None])
def test_what_is_no_whole_zip_is_refused(folder: Path, content: bytes | None) -> None:
    archive = make_zip(folder)
    archive.write_bytes(archive.read_bytes()[:-200] if content is None else content)
    with pytest.raises(InputError, match=r"animals\.zip: no zip file that can be read"):
        open_zip(archive, "animals")


def test_image_beside_class_directories_has_no_label(folder: Path) -> None:
    with pytest.raises(InputError, match=r"stray\.png lies beside the class directories"):
        open_zip(make_zip(folder, **{"stray.png": b"x"}), "animals")
