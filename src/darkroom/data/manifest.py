"""The manifest: a row per image of the source, the bad ones included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from darkroom.data.images import Picture
from darkroom.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

NO_SPLIT = "none"  # of an image that could not be decoded


@dataclass
class Row:
    """One image. What is unknown because it could not be decoded is None."""

    path: str  # relative to the source
    split: str  # train, test or none
    label: int
    class_name: str
    format: str  # of the file
    mode: str  # of its pixels, by Pillow's name
    width: int | None  # of the source image, upright
    height: int | None
    bytes: int
    packed: str | None  # shape in the packed array: "CxHxW"
    mean: float | None  # of the packed pixels, 0..255
    std: float | None
    sha256: str  # of the file; of the pixels for a source without files
    constant: bool  # all packed pixels are the same
    decoded: bool
    error: str  # why it was not decoded; empty otherwise


def make_row(path: str, label: int, class_name: str, picture: Picture) -> Row:
    """The row of an image that has no split yet."""
    pixels, packed, mean, std, constant = picture.pixels, None, None, None, False
    if pixels is not None:
        values = pixels.astype(np.int64)
        # Whole numbers up to the last step, so that every machine gives the same mean and deviation.
        total, squares, count = int(values.sum()), int((values * values).sum()), values.size
        packed = "x".join(map(str, pixels.shape))
        mean, std = total / count, (max(count * squares - total * total, 0) ** 0.5) / count
        constant = bool(pixels.min() == pixels.max())
    return Row(
        path=path,
        split=NO_SPLIT,
        label=label,
        class_name=class_name,
        format=picture.format,
        mode=picture.mode,
        width=picture.width,
        height=picture.height,
        bytes=picture.bytes,
        packed=packed,
        mean=mean,
        std=std,
        sha256=picture.sha256,
        constant=constant,
        decoded=pixels is not None,
        error=picture.error,
    )


def write_manifest(path: Path, rows: list[Row]) -> None:
    """Write `rows` as Parquet; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, optional = pa.string(), True
    schema = pa.schema(
        [
            pa.field("path", text, not optional),
            pa.field("split", text, not optional),
            pa.field("label", pa.int32(), not optional),
            pa.field("class_name", text, not optional),
            pa.field("format", text, not optional),
            pa.field("mode", text, not optional),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("bytes", pa.int64(), not optional),
            pa.field("packed", text),
            pa.field("mean", pa.float64()),
            pa.field("std", pa.float64()),
            pa.field("sha256", text, not optional),
            pa.field("constant", pa.bool_(), not optional),
            pa.field("decoded", pa.bool_(), not optional),
            pa.field("error", text, not optional),
        ]
    )
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


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
