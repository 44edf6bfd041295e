"""A folder with a directory per class, perhaps below one directory per split, or with images and no classes."""

import os
from functools import partial
from pathlib import Path

import numpy as np

from darkroom.data.images import SUFFIXES
from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.reading import Files, as_text, identity
from darkroom.errors import InputError

SPLIT_NAMES = {"train": TRAIN, "test": TEST, "val": TEST, "valid": TEST, "validation": TEST}


# A file of the listing: the parts of its path below the directory that was listed, by which it is sorted; its bytes;
# when it was modified, in nanoseconds.
File = tuple[tuple[str, ...], int, int]


def open_folder(root: Path, name: str) -> Source:
    """Every PNG, JPEG, WebP and BMP at any depth below the class directories; other files and hidden ones are left out.

    Class directories and files are in plain string order, so "10" comes before "2". A folder whose directories are
    train and test (or val, valid, validation) has a split of its own. Raises InputError for a folder without images, a
    class without images, images beside class directories, and links that lead nowhere or in a circle.
    """
    splits = _splits(root)
    names = sorted({directory for split in splits.values() for directory in _directories(split)})
    if not names:
        return open_unlabelled(root, name)
    files: list[str] = []
    labels: list[int] = []
    origins: list[int] = []
    known: list[tuple[object, ...]] = []
    for label, class_name in enumerate(names):
        before = len(files)
        for prefix, split in splits.items():
            directory, above = split / class_name, (prefix,) if prefix else ()
            found = _images(directory) if directory.is_dir() else []
            files += ["/".join((*above, class_name, *parts)) for parts, _, _ in found]
            origins += [SPLIT_NAMES.get(prefix, TRAIN)] * len(found)
            known += [(prefix, class_name, *parts, size, modified) for parts, size, modified in found]
        if len(files) == before:
            raise InputError(f"{root / class_name}: class directory without images ({', '.join(SUFFIXES)})")
        labels += [label] * (len(files) - before)
    return _source(root, name, "a directory per class", [as_text(n) for n in names], files, labels, origins, known)


def open_unlabelled(root: Path, name: str) -> Source:
    """Every image at any depth, without classes. Raises InputError for a folder without images."""
    files: list[str] = []
    origins: list[int] = []
    known: list[tuple[object, ...]] = []
    for prefix, split in _splits(root).items():
        found, above = _images(split), (prefix,) if prefix else ()
        files += ["/".join((*above, *parts)) for parts, _, _ in found]
        origins += [SPLIT_NAMES.get(prefix, TRAIN)] * len(found)
        known += [(prefix, *parts, size, modified) for parts, size, modified in found]
    if not files:
        raise InputError(f"{root}: no images ({', '.join(SUFFIXES)}); expected a directory per class with images in it")
    return _source(root, name, "images without classes", [], files, [0] * len(files), origins, known)


def _source(
    root: Path,
    name: str,
    form: str,
    classes: list[str],
    files: list[str],
    labels: list[int],
    origins: list[int],
    known: list[tuple[object, ...]],
) -> Source:
    split = set(origins) == {TRAIN, TEST}
    return Source(
        name=name,
        form=form,
        classes=classes,
        paths=[as_text(file) for file in files],
        labels=np.array(labels, dtype=np.int32),
        splits=np.array(origins, dtype=np.uint8) if split else None,
        identity=identity(form, known),
        part=partial(_part, str(root), files),
    )


def _part(root: str, files: list[str], start: int, stop: int) -> Files:
    return Files(root, files[start:stop])


def _splits(root: Path) -> dict[str, Path]:
    """Directories of a folder's own split by name; the folder itself, without a name, when it has none."""
    found = _directories(root, refuse_images=False)
    if "train" in found and len(found) > 1 and set(found) <= set(SPLIT_NAMES):
        return {name: root / name for name in found}
    return {"": root}


def _directories(root: Path, refuse_images: bool = True) -> list[str]:
    """Names of the visible directories of a folder, sorted. Images beside them have no label."""
    names, stray = [], []
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{root}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_directory(entry):
            names.append(entry.name)
        elif entry.name.lower().endswith(SUFFIXES):
            stray.append(entry.name)
    if names and stray and refuse_images:
        raise InputError(
            f"{root}: {len(stray)} images beside the class directories, {as_text(stray[0])} for one, have no label; "
            "move them into a class directory"
        )
    return names


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        is_directory = entry.is_dir()
        if not is_directory and entry.is_symlink():
            entry.stat()
    except OSError as error:
        if entry.name.lower().endswith(SUFFIXES):
            return False  # listed, and reported as unreadable
        raise InputError(f"{as_text(entry.path)}: a link that leads nowhere: {error.strerror}") from None
    return is_directory


def _images(directory: Path) -> list[File]:
    """The images at any depth, sorted by the parts of their paths; links to directories are followed."""
    found: list[File] = []

    def walk(path: str, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
        try:
            known = os.stat(path)  # noqa: PTH116 (as scandir gives it)
            entries = list(os.scandir(path))
        except OSError as error:
            raise InputError(f"{as_text(path)}: cannot be listed: {error.strerror}") from None
        here = (known.st_dev, known.st_ino)
        if here in above:
            raise InputError(f"{as_text(path)}: a link to a directory that it lies in")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_directory(entry):
                walk(entry.path, (*parts, entry.name), (*above, here))
            elif entry.name.lower().endswith(SUFFIXES):
                try:
                    status = entry.stat()
                    found.append(((*parts, entry.name), status.st_size, status.st_mtime_ns))
                except OSError:
                    found.append(((*parts, entry.name), 0, 0))

    walk(str(directory), (), ())
    return sorted(found)
