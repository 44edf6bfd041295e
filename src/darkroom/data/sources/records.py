"""Images as records of one size, planar pixels in large files: CIFAR's batches and ImageNet-64's arrays."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.errors import InputError


@dataclass(frozen=True)
class RecordFile:
    """Where the records of a file are."""

    path: str
    stem: str  # what it is called in the images' paths
    split: int  # TRAIN or TEST
    offset: int  # of the first record, in bytes
    size: int  # of a record
    skip: int  # bytes of a record before its pixels
    count: int  # of records


@dataclass(frozen=True)
class Records:
    """The images of `rows`, counted over all files, in that order: uint8 (side, side, 3).

    Read by position and not through a memory map: a file that shrinks under a map kills the process that reads it.
    """

    files: list[RecordFile]
    rows: NDArray[np.int64]
    side: int

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        owners, rows = _locate(self.files, self.rows)
        with ExitStack() as stack:
            opened = {owner: _open(self.files[owner], stack) for owner in np.unique(owners).tolist()}
            for owner, row in zip(owners.tolist(), rows.tolist(), strict=True):
                yield _read(self.files[owner], opened[owner], row, self.side)


def record_source(
    name: str,
    form: str,
    classes: list[str],
    files: list[RecordFile],
    labels: list[NDArray[np.int32]],
    side: int,
    identity: str,
) -> Source:
    """The source of all records of `files`, with `labels` per file: by label, then by file and record."""
    every = np.concatenate(labels)
    order = np.argsort(every, kind="stable")
    every = every[order]
    owners, rows = _locate(files, order)
    splits = np.array([file.split for file in files], dtype=np.uint8)[owners]
    names = {TRAIN: "train", TEST: "test"}
    prefixes = [[f"{names[file.split]}/{class_name}/{file.stem}-" for class_name in classes] for file in files]
    places = zip(owners.tolist(), every.tolist(), rows.tolist(), strict=True)
    return Source(
        name=name,
        form=form,
        classes=classes,
        paths=[f"{prefixes[owner][label]}{row:05d}" for owner, label, row in places],
        labels=every,
        splits=splits if {file.split for file in files} == {TRAIN, TEST} else None,
        identity=identity,
        part=partial(_part, files, order, side),
    )


def _part(files: list[RecordFile], rows: NDArray[np.int64], side: int, start: int, stop: int) -> Records:
    return Records(files, rows[start:stop], side)


def _locate(files: list[RecordFile], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The file of each row, and the row in it."""
    ends = np.cumsum([file.count for file in files])
    owners = np.searchsorted(ends, rows, side="right")
    return owners, rows - (ends[owners] - np.array([file.count for file in files])[owners])


def _open(file: RecordFile, stack: ExitStack) -> int:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error.strerror}; it was there when it was listed") from None
    stack.callback(os.close, descriptor)
    return descriptor


def _read(file: RecordFile, descriptor: int, row: int, side: int) -> NDArray[np.uint8]:
    size = 3 * side * side
    try:
        content = os.pread(descriptor, size, file.offset + row * file.size + file.skip)
    except OSError as error:
        raise InputError(f"{file.path}: record {row}: cannot be read: {error.strerror}") from None
    if len(content) < size:
        raise InputError(f"{file.path}: record {row}: cut off; the file was whole when it was listed")
    return np.ascontiguousarray(np.frombuffer(content, dtype=np.uint8).reshape(3, side, side).transpose(1, 2, 0))
