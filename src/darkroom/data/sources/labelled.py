"""A zip or a folder with `dataset.json`, the exchange format of the EDM family; or a zip with a directory per class."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from darkroom.data.images import SUFFIXES, Content, Unreadable
from darkroom.data.sources import Source
from darkroom.data.sources.folder import open_unlabelled
from darkroom.data.sources.reading import Files, as_text, file_entry, identity, read_file
from darkroom.data.sources.zipped import Member, Members, list_members, read_member
from darkroom.errors import InputError

LABELS_FILE = "dataset.json"


def open_zip(path: Path, name: str) -> Source:
    """Images in a zip, labelled by its `dataset.json`, else by the directory that holds each.

    Nothing is extracted. Raises InputError for a damaged zip, unsafe names, and labels that do not fit.
    """
    members = list_members(path)
    images = {n: member for n, member in members.items() if _is_image(n)}
    if not images:
        raise InputError(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    if LABELS_FILE in members:
        where = f"{path}: {LABELS_FILE}"
        labels, classes = _parse(where, read_member(path, members[LABELS_FILE]), images)
        form = f"zip with {LABELS_FILE}"
    else:
        labels, classes = _by_directory(path, images)
        form = "zip with a directory per class" if classes else "zip with images without classes"
    order = _order(labels)
    known = (file_entry(path), *((n, images[n].crc, images[n].size) for n in order))
    return _source(name, form, classes, labels, order, known, partial(_zip_part, str(path), [images[n] for n in order]))


def open_labelled_folder(root: Path, name: str) -> Source:
    """Images in a folder with `dataset.json`. Raises InputError for labels that do not fit and images that are missing.

    Only the files that are named there are read, and none outside the folder.
    """
    where = f"{root / LABELS_FILE}"
    labels, classes = _parse(where, read_file(str(root / LABELS_FILE)), None)
    if not labels:
        return open_unlabelled(root, name)
    known: list[tuple[object, ...]] = []
    order = _order(labels)
    inside = root.resolve()
    for file in order:
        target = root / file
        if not target.resolve().is_relative_to(inside):
            raise InputError(f"{where}: {file!r} reaches outside the folder; refused")
        try:
            status = target.stat()
        except OSError as error:
            raise InputError(f"{where}: {file}: {error.strerror}") from None
        known.append((file, status.st_size, status.st_mtime_ns))
    part = partial(_folder_part, str(root), order)
    return _source(name, f"folder with {LABELS_FILE}", classes, labels, order, known, part)


def _source(
    name: str,
    form: str,
    classes: list[str],
    labels: dict[str, int],
    order: list[str],
    known: Iterable[tuple[object, ...]],
    part: Any,
) -> Source:
    return Source(
        name=name,
        form=form,
        classes=classes,
        paths=[as_text(file) for file in order],
        labels=np.array([labels[file] for file in order], dtype=np.int32),
        splits=None,
        identity=identity(form, [tuple(classes), *((labels[f],) for f in order), *known]),
        part=part,
    )


def _zip_part(path: str, members: list[Member], start: int, stop: int) -> Iterable[Content]:
    return Members(path, members[start:stop])


def _folder_part(root: str, files: list[str], start: int, stop: int) -> Iterable[Content]:
    return Files(root, files[start:stop])


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def _order(labels: dict[str, int]) -> list[str]:
    """By label, then by the parts of the path, as a folder with a directory per class is ordered."""
    return sorted(labels, key=lambda file: (labels[file], file.split("/")))


def _by_directory(path: Path, images: dict[str, Member]) -> tuple[dict[str, int], list[str]]:
    """Labels from the first part of each name; no classes when there are no directories."""
    tops = {name: name.split("/")[0] if "/" in name else "" for name in images}
    classes = sorted(set(tops.values()))
    if classes == [""]:
        return dict.fromkeys(images, 0), []
    if "" in classes:
        stray = min(name for name, top in tops.items() if not top)
        raise InputError(f"{path}: {stray} lies beside the class directories and has no label")
    numbers = {name: number for number, name in enumerate(classes)}
    return {name: numbers[top] for name, top in tops.items()}, classes


def _parse(
    where: str, content: bytes | Unreadable, images: dict[str, Member] | None
) -> tuple[dict[str, int], list[str]]:
    """Label by file name, and the names of the classes: {"labels": [["00000/img.png", 6], …], "classes": ["ant", …]}.

    `classes` is an addition to the format; without it a class is called by its number. `"labels": null` means that
    there are none.
    """
    if isinstance(content, Unreadable):
        raise InputError(f"{where}: {content.reason}")
    try:
        value = json.loads(content)
        pairs, names = value["labels"], value.get("classes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"{type(error).__name__}: {error}"
        raise InputError(f'{where}: expected {{"labels": [["file", number], …]}} in JSON ({text})') from None
    if pairs is None:
        return dict.fromkeys(images or (), 0), []
    labels: dict[str, int] = {}
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"{where}: labels: expected a list of [file, number], found {type(pairs).__name__}")
    for row, pair in enumerate(pairs):
        file, label = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(file, str) or not isinstance(label, int) or isinstance(label, bool) or label < 0:
            found = json.dumps(pair)[:80]
            raise InputError(f"{where}: labels, row {row}: expected [file, number from 0], found {found}")
        parts = PurePosixPath(file).parts
        if file.startswith("/") or ".." in parts or "\\" in file or "\0" in file or not parts:
            raise InputError(f"{where}: labels, row {row}: {file!r} reaches outside; refused")
        if not file.lower().endswith(SUFFIXES):
            raise InputError(f"{where}: labels, row {row}: {file!r} is no image ({', '.join(SUFFIXES)})")
        if file in labels:
            raise InputError(f"{where}: labels, row {row}: {file!r} is there twice")
        labels[file] = label
    if images is not None:
        _refuse_other_files(where, labels, images)
    return labels, _class_names(where, labels, names)


def _refuse_other_files(where: str, labels: dict[str, int], images: dict[str, Member]) -> None:
    if missing := sorted(labels.keys() - images.keys()):
        raise InputError(f"{where}: {len(missing)} labelled images are not in the archive, {missing[0]!r} for one")
    if unlabelled := sorted(images.keys() - labels.keys()):
        raise InputError(f"{where}: {len(unlabelled)} images of the archive have no label, {unlabelled[0]!r} for one")


def _class_names(where: str, labels: dict[str, int], names: object) -> list[str]:
    count = max(labels.values()) + 1
    if names is None:
        present = set(labels.values())
        if count > len(present):
            gap = next(label for label in range(count) if label not in present)
            raise InputError(f"{where}: label {gap} has no images; expected labels 0 to {count - 1} without gaps")
        return [str(number) for number in range(count)]
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise InputError(f"{where}: classes: expected a list of different names")
    if count > len(names):
        raise InputError(f"{where}: label {count - 1}; classes names {len(names)}, for labels 0 to {len(names) - 1}")
    return names
