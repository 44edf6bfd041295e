"""The manifest: a row per image of the source, the bad ones included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darkroom.data.images import Picture
from darkroom.data.perceptual import perceptual_hashes
from darkroom.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NO_SPLIT = "none"  # of an image that could not be decoded

# name -> (Arrow type, may be null). What is unknown because an image could not be decoded is null.
_LISTED = {
    "path": ("string", False),  # relative to the source
    "split": ("string", False),  # train, test or none
    "label": ("int32", False),
    "class_name": ("string", False),  # empty in unlabelled data
}
_READ = {
    "format": ("string", False),  # of the file
    "mode": ("string", False),  # of its pixels, by Pillow's name
    "width": ("int32", True),  # of the source image, upright
    "height": ("int32", True),
    "bytes": ("int64", False),
    "packed": ("string", True),  # shape in the packed array: "CxHxW"
    "mean": ("float64", True),  # of the packed pixels, 0..255
    "std": ("float64", True),
    "sha256": ("string", False),  # of the file; of the pixels for a source without files
    "phash": ("uint64", False),  # of the packed pixels; 0 without any
    "constant": ("bool", False),  # all packed pixels have the same colour
    "decoded": ("bool", False),
    "error": ("string", False),  # why it was not decoded; empty otherwise
}
COLUMNS = (*_LISTED, *_READ)


def describe(pixels: NDArray[np.uint8]) -> tuple[dict[str, list[Any]], NDArray[np.int64]]:
    """The columns that packed pixels (N, C, H, W) give, a value per image; and sums and squares by channel, (2, C)."""
    # Whole numbers up to the last step, so that every machine gives the same mean and deviation.
    count = math.prod(pixels.shape[1:])
    sums = pixels.sum(axis=(2, 3), dtype=np.int64)
    squares = np.square(pixels, dtype=np.uint16).sum(axis=(2, 3), dtype=np.int64)
    total = sums.sum(axis=1)
    columns = {
        "packed": ["x".join(map(str, pixels.shape[1:]))] * len(pixels),
        "mean": (total / count).tolist(),
        "std": (np.sqrt(count * squares.sum(axis=1) - total * total) / count).tolist(),
        "phash": perceptual_hashes(pixels).tolist(),
        "constant": (pixels == pixels[:, :, :1, :1]).all(axis=(1, 2, 3)).tolist(),
    }
    return columns, np.stack([sums.sum(axis=0), squares.sum(axis=0)])


def picture_table(pictures: Sequence[Picture], described: dict[str, list[Any]]) -> pa.Table:
    """The columns that reading gives, a row per picture; `described` are those of the decoded ones."""
    import pyarrow as pa

    missing = {"packed": None, "mean": None, "std": None, "phash": 0, "constant": False}
    columns: dict[str, list[Any]] = {
        name: [getattr(picture, name) for picture in pictures]
        for name in ("format", "mode", "width", "height", "bytes", "sha256", "error")
    }
    columns["decoded"] = [picture.pixels is not None for picture in pictures]
    for name, values in described.items():
        value = iter(values)
        columns[name] = [next(value) if decoded else missing[name] for decoded in columns["decoded"]]
    return pa.table({name: columns[name] for name in _READ}, schema=_schema(_READ))


def complete(
    read: pa.Table, paths: Sequence[str], labels: NDArray[np.int32], classes: Sequence[str], splits: NDArray[np.uint8]
) -> pa.Table:
    """The manifest: what was read, and what the listing knows. `splits` are positions in ("train", "test", "none")."""
    import pyarrow as pa

    names = pa.array(["train", "test", NO_SPLIT], pa.string())
    listed = {
        "path": pa.array(paths, pa.string()),
        "split": names.take(pa.array(splits)),
        "label": pa.array(labels, pa.int32()),
        "class_name": pa.array(list(classes) or [""], pa.string()).take(pa.array(labels)),
    }
    columns = listed | {name: read[name] for name in _READ}
    return pa.table(columns, schema=_schema(_LISTED | _READ))


def _schema(columns: dict[str, tuple[str, bool]]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.type_for_alias(kind), null) for name, (kind, null) in columns.items()])


def write_manifest(path: Path, table: pa.Table) -> None:
    """Write `table` as Parquet; the same rows give the same bytes."""
    import pyarrow.parquet as pq

    pq.write_table(table.combine_chunks(), path, compression="zstd")


def read_manifest(path: Path) -> pd.DataFrame:
    """The manifest as Great Expectations wants it. Raises InputError when it is missing or garbled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        frame: pd.DataFrame = pq.read_table(path).to_pandas()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the prepare stage writes it") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run the prepare stage again") from None
    return frame
