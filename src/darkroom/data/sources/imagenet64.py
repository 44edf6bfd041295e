"""Downsampled ImageNet (Chrabaszcz 2017) in its official form: a folder of npz batches, read where they lie."""

import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darkroom.data.images import MAX_PIXELS, Unreadable
from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.reading import file_entry, identity
from darkroom.data.sources.records import RecordFile, record_source
from darkroom.data.sources.unpacking import unpack, unpacked_name
from darkroom.data.sources.zipped import Member, list_members, read_member
from darkroom.errors import InputError
from darkroom.files import replacing

CLASSES_FILE = "map_clsloc.txt"
_NAME = re.compile(r"train_data_batch_(\d+)\.npz|val_data\.npz")
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name


@dataclass(frozen=True)
class _Batch:
    path: Path
    member: Member  # its pixels
    header: int  # bytes of the member before the pixels
    count: int
    side: int
    labels: NDArray[np.int64]  # from 1


def open_imagenet64(root: Path, files: list[Path], name: str, scratch: Path) -> Source:
    """The source in `train_data_batch_1.npz` … and `val_data.npz`, the test split: RGB, square, of one size.

    Classes are in the order of their numbers, which start with 1; names come from `map_clsloc.txt` in the folder, else
    the numbers are the names. Arrays are read in place, compressed ones from a copy in `scratch` that is made once.
    Raises InputError for damaged files, pickled arrays, and shapes, types and labels that do not fit.
    """
    ordered = sorted(files, key=_place)
    batches = [_check(path) for path in ordered]
    for batch in batches[1:]:
        if batch.side != batches[0].side:
            first = f"{batches[0].path.name} has {batches[0].side}x{batches[0].side}"
            raise InputError(f"{batch.path}: images of {batch.side}x{batch.side} pixels; {first}")
    classes = _class_names(root / CLASSES_FILE, batches)
    for batch in batches:
        if len(wrong := np.flatnonzero((batch.labels < 1) | (batch.labels > len(classes)))):
            row = int(wrong[0])
            raise InputError(f"{batch.path}: labels, row {row}: {batch.labels[row]}; expected 1 to {len(classes)}")
    side = batches[0].side
    form = f"ImageNet {side}x{side} batches"
    known = [tuple(classes), *(file_entry(batch.path) for batch in batches)]
    records = [_records(batch, scratch) for batch in batches]
    labels = [(batch.labels - 1).astype(np.int32) for batch in batches]
    return record_source(name, form, classes, records, labels, side, identity(form, known))


def _place(path: Path) -> tuple[int, int]:
    """Batches by number, so that 10 comes after 9, then the held-out images."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path}: unknown batch; expected train_data_batch_1.npz … and val_data.npz")
    return (TRAIN, int(match[1])) if match[1] else (TEST, 0)


def _check(path: Path) -> _Batch:
    """Everything about a batch that can be known without its pixels."""
    members = list_members(path)
    if missing := [key for key in ("data", "labels") if f"{key}.npy" not in members]:
        raise InputError(f"{path}: no array {missing[0]!r}; expected data and labels, found {', '.join(members)}")
    member = members["data.npy"]
    if member.encrypted or member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: data: encrypted or of an unknown compression; expected stored or deflated")
    shape, header = _data_header(path, member)
    count, width = shape
    side = math.isqrt(width // 3)
    if not count or not side or width != 3 * side * side or side * side > MAX_PIXELS:
        raise InputError(f"{path}: data: shape {shape}; expected (images, 3 * side * side)")
    if member.size != header + count * width:
        raise InputError(f"{path}: data: {member.size - header:,} bytes of pixels; shape {shape} has {count * width:,}")
    return _Batch(path, member, header, count, side, _labels(path, members["labels.npy"], count))


def _data_header(path: Path, member: Member) -> tuple[tuple[int, int], int]:
    """Shape of the array, and where it begins in the member. Nothing here can unpickle."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise InputError(f"{path}: data: no array of version 1.0 of the npy format")
            shape, column_order, dtype = np.lib.format.read_array_header_1_0(stream)
            header = stream.tell()
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path}: data: no npy array that can be read: {error}") from None
    if dtype.hasobject:
        raise InputError(f"{path}: data: a pickled array; refused, since a pickle can run any code")
    if dtype != np.uint8 or len(shape) != 2 or column_order:
        order = ", column by column" if column_order else ""
        raise InputError(f"{path}: data: {dtype} of shape {shape}{order}; expected uint8 (images, 3 * side * side)")
    return shape, header


def _labels(path: Path, member: Member, count: int) -> NDArray[np.int64]:
    content = read_member(path, member)
    if isinstance(content, Unreadable):
        raise InputError(f"{path}: labels: {content.reason}")
    try:
        labels = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: labels: no npy array that can be read, or a pickled one: {error}") from None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} of shape {labels.shape}"
        raise InputError(f"{path}: labels: {found}; data has {count} images: expected whole numbers ({count},)")
    return labels.astype(np.int64)


def _class_names(path: Path, batches: list[_Batch]) -> list[str]:
    """From lines such as "n02119789 1 kit_fox", by number. Of classes of one name each gets its synset added."""
    if not path.is_file():
        largest = max(int(batch.labels.max()) for batch in batches)
        images = sum(batch.count for batch in batches)
        if largest > images:
            raise InputError(f"{batches[0].path.parent}: label {largest} among {images} images; expected 1 to 1000")
        return [str(number) for number in range(1, largest + 1)]
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        known = {int(number): (synset, text) for synset, number, text in lines}
    except (OSError, ValueError) as error:
        raise InputError(f'{path}: expected lines like "n02119789 1 kit_fox": {error}') from None
    if sorted(known) != list(range(1, len(lines) + 1)):
        raise InputError(f"{path}: expected the numbers 1 to {len(lines)}, each once")
    texts = [text for _, text in known.values()]
    return [
        text if texts.count(text) == 1 else f"{text} ({synset})" for synset, text in (known[n] for n in sorted(known))
    ]


def _records(batch: _Batch, scratch: Path) -> RecordFile:
    """Where the pixels can be read: in the npz itself, or unpacked."""
    path, start = batch.path, 0
    if batch.member.method == zipfile.ZIP_STORED:
        start = _start(batch)
    else:
        path = scratch / f"{unpacked_name(batch.path)}.npy"
        if not path.is_file():
            _unpack(batch, path)
    return RecordFile(
        path=str(path),
        stem=batch.path.stem,
        split=_place(batch.path)[0],
        offset=start + batch.header,
        size=3 * batch.side**2,
        skip=0,
        count=batch.count,
    )


def _start(batch: _Batch) -> int:
    """Where a stored member's bytes begin in the zip."""
    with batch.path.open("rb") as file:
        file.seek(batch.member.offset)
        header = file.read(_LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = batch.member.offset + _LOCAL_HEADER + lengths
    if start + batch.member.size > batch.path.stat().st_size:
        raise InputError(f"{batch.path}: data: reaches beyond the end of the file")
    return start


def _unpack(batch: _Batch, target: Path) -> None:
    try:
        with (
            replacing(target) as temporary,
            zipfile.ZipFile(batch.path) as archive,
            archive.open("data.npy") as stream,
        ):
            unpack(stream, batch.member.size, temporary, f"{batch.path}: data")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{batch.path}: data: damaged: {error}") from None
