"""Parquet files as the Hugging Face hub lays them out: image files in a column of bytes, labels with the names of
their classes in the schema. Row groups are streamed, so that neither their size nor the files' matters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darkroom.data.images import MAX_BYTES, Unreadable
from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.folder import SPLIT_NAMES
from darkroom.data.sources.parquet_schema import Columns, find_columns
from darkroom.data.sources.reading import as_text, file_entry, identity
from darkroom.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})\b")  # train-00000-of-00002.parquet
_BATCH_BYTES = 1 << 24  # that are decoded at a time
_MAX_BATCH = 1024  # rows
_READ_AHEAD = 1 << 20  # bytes of a column that are read at a time


@dataclass(frozen=True)
class Rows:
    """The images of rows `start` to `stop` - 1, counted over all files, in order."""

    files: list[tuple[str, int]]  # path, number of rows
    image: str  # column
    start: int
    stop: int

    def __iter__(self) -> Iterator[bytes | Unreadable]:
        first = 0
        for path, count in self.files:
            start, stop = max(self.start - first, 0), min(self.stop - first, count)
            if start < stop:
                yield from _read(path, self.image, start, stop)
            first += count


def open_parquet(root: Path, files: list[Path], name: str) -> Source:
    """The source in Parquet files of one schema, in the order of `files` and of their rows.

    The split is the files' where their names say so for all: train-…, test-…, validation-…. Without a column of labels
    the source is unlabelled. A row without bytes is an unreadable image. Raises InputError for damaged files, missing
    columns, files that differ in schema, and labels that are null or have no class.
    """
    columns: Columns | None = None
    counts: list[int] = []
    labels: list[NDArray[np.int64]] = []
    for path in files:
        with _opened(path) as file:
            found = find_columns(file.schema_arrow, path)
            if columns is not None and found != columns:
                raise InputError(f"{path}: its columns or classes are not those of {files[0].name}: {found}, {columns}")
            columns = found
            counts.append(file.metadata.num_rows)
            labels.append(_labels(file, columns, path))
    if columns is None or not sum(counts):
        raise InputError(f"{root}: no rows in {len(files)} Parquet files")
    classes = _classes(columns, files, labels)
    names = [as_text(str(path.relative_to(root))) if path != root else as_text(path.name) for path in files]
    splits = [SPLIT_NAMES[match[1]] if (match := _SPLIT.match(path.name)) else None for path in files]
    form = f"{len(files)} Parquet file{'s' * (len(files) > 1)}"
    return Source(
        name=name,
        form=form,
        classes=classes,
        paths=[f"{file}/{row:06d}" for file, count in zip(names, counts, strict=True) for row in range(count)],
        labels=np.concatenate(labels).astype(np.int32),
        splits=np.repeat(np.array(splits, dtype=np.uint8), counts) if set(splits) == {TRAIN, TEST} else None,
        identity=identity(form, [(columns.image, columns.label), tuple(classes), *map(file_entry, files)]),
        part=partial(Rows, list(zip(map(str, files), counts, strict=True)), columns.image),
    )


def _labels(file: pq.ParquetFile, columns: Columns, path: Path) -> NDArray[np.int64]:
    """One per row; 0 without a column of labels."""
    count = file.metadata.num_rows
    if columns.label is None:
        return np.zeros(count, dtype=np.int64)
    column = file.read(columns=[columns.label], use_threads=False).column(0)
    where = f"{path}: column {columns.label}"
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise InputError(f"{where}, row {row}: null; every image needs a label, or none has the column")
    labels: NDArray[np.int64] = column.cast("int64").to_numpy()
    if len(labels) != count:
        raise InputError(f"{where}: {len(labels)} labels for {count} rows")
    wrong = labels < 0
    if columns.names is not None:
        wrong |= labels >= len(columns.names)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        allowed = f"0 to {len(columns.names) - 1}" if columns.names is not None else "numbers from 0"
        raise InputError(f"{where}, row {row}: label {labels[row]}; expected {allowed}")
    return labels


def _classes(columns: Columns, files: list[Path], labels: list[NDArray[np.int64]]) -> list[str]:
    if columns.label is None:
        return []
    if columns.names is not None:
        return list(columns.names)
    largest, total = max(int(own.max(initial=0)) for own in labels), sum(map(len, labels))
    if largest >= total:
        raise InputError(f"{files[0]}: column {columns.label}: label {largest} among {total} images")
    return [str(number) for number in range(largest + 1)]


def _read(path: str, image: str, start: int, stop: int) -> Iterator[bytes | Unreadable]:
    """The images of rows `start` to `stop` - 1 of one file."""
    with _opened(Path(path)) as file:
        groups, first = _groups(file, start, stop)
        size = _batch_size(file, image, groups)
        row = first
        for batch in file.iter_batches(size, row_groups=groups, columns=[image], use_threads=False):
            column = _bytes(batch.column(0))
            begin, end = max(start - row, 0), min(stop - row, len(column))
            for value in column[begin:end].to_pylist() if begin < end else []:
                yield _content(value)
            row += len(column)
            if row >= stop:
                return
        raise InputError(f"{path}: ends after row {row}; it had {stop} rows or more when it was listed")


def _content(value: object) -> bytes | Unreadable:
    if not isinstance(value, bytes):
        return Unreadable("no bytes in the row: null, or a path alone")
    if len(value) > MAX_BYTES:
        return Unreadable(f"{len(value):,} bytes, over the limit of {MAX_BYTES:,}", len(value))
    return value


def _bytes(column: pa.Array) -> pa.Array:
    """The column of bytes; of a struct<bytes, path> only that member was read."""
    import pyarrow as pa

    return column.flatten()[0] if pa.types.is_struct(column.type) else column


def _groups(file: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows `start` to `stop` - 1, and the first row of the first of them."""
    groups: list[int] = []
    first = row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < stop and row + count > start:
            first = first if groups else row
            groups.append(group)
        row += count
    return groups, first


def _batch_size(file: pq.ParquetFile, image: str, groups: list[int]) -> int:
    """Rows that are about `_BATCH_BYTES`."""
    size, rows = 0, 1
    for number in groups:
        group = file.metadata.row_group(number)
        rows += group.num_rows
        columns = map(group.column, range(group.num_columns))
        size += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == image)
    return min(max(_BATCH_BYTES * rows // max(size, 1), 1), _MAX_BATCH)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A `pq.ParquetFile`; whatever the library says about it, then and later, is an InputError that names the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: no Parquet file that can be read, or not all of one: {reason}") from None
