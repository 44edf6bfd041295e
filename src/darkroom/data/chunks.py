"""A chunk of images, decoded by one process and kept until all are there: what a kill can cost."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darkroom.data.images import Content, Picture, decode
from darkroom.data.manifest import describe, picture_table
from darkroom.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

_MOMENTS, _CHECKSUM = b"moments", b"crc32"  # in the table's metadata
_CACHED = 1 << 19  # bytes of pixels that are described at once: they stay in the processor's cache


@dataclass(frozen=True)
class Chunk:
    """Where a chunk is kept: pixels, and a table that comes last and vouches for them."""

    directory: Path
    number: int
    image_size: int
    channels: int

    @property
    def pixels_file(self) -> Path:
        return self.directory / f"{self.number:06d}.pixels"

    @property
    def table_file(self) -> Path:
        return self.directory / f"{self.number:06d}.parquet"

    def is_whole(self) -> bool:
        """Whether the chunk was finished; the pixels were not synced, so a machine that lost power may lack some."""
        try:
            return int(self._metadata()[_CHECKSUM]) == zlib.crc32(self.pixels().data)
        except (OSError, ValueError):  # Arrow's errors are among them
            return False

    def table(self) -> pa.Table:
        """A row per image, without what the listing knows."""
        import pyarrow.parquet as pq

        return pq.read_table(self.table_file)

    def moments(self) -> NDArray[np.int64]:
        """Sums and sums of squares of the decoded images' pixels, by channel: (2, C)."""
        return np.array(json.loads(self._metadata()[_MOMENTS]), dtype=np.int64)

    def pixels(self) -> NDArray[np.uint8]:
        """Those of the decoded images, (N, C, H, W), memory-mapped."""
        shape = (-1, self.channels, self.image_size, self.image_size)
        if not self.pixels_file.stat().st_size:  # which cannot be mapped
            return np.empty((0, *shape[1:]), dtype=np.uint8)
        return np.memmap(self.pixels_file, dtype=np.uint8, mode="r").reshape(shape)

    def _metadata(self) -> dict[bytes, bytes]:
        import pyarrow.parquet as pq

        metadata: dict[bytes, bytes] = pq.read_schema(self.table_file).metadata
        return metadata


def make_chunk(chunk: Chunk, contents: Iterable[Content], count: int) -> int:
    """Decode `count` images and write the chunk; returns `count`. Raises ValueError when there are more or fewer."""
    pixels = np.empty((count, chunk.channels, chunk.image_size, chunk.image_size), dtype=np.uint8)
    pictures: list[Picture] = []
    good = 0
    for content in contents:
        picture = decode(content, chunk.image_size, chunk.channels)
        if picture.pixels is not None:
            pixels[good] = picture.pixels
            picture.pixels = pixels[good]
            good += 1
        pictures.append(picture)
    if len(pictures) != count:
        raise ValueError(f"chunk {chunk.number}: {len(pictures)} images, expected {count}")
    _write(chunk, pictures, pixels[:good])
    return count


def _write(chunk: Chunk, pictures: list[Picture], pixels: NDArray[np.uint8]) -> None:
    import pyarrow.parquet as pq

    columns, moments = describe(pixels[:0])
    step = max(1, _CACHED // (chunk.channels * chunk.image_size**2))
    for start in range(0, len(pixels), step):
        more, sums = describe(pixels[start : start + step])
        moments += sums
        for name, values in more.items():
            columns[name] += values
    metadata = {_MOMENTS: json.dumps(moments.tolist()), _CHECKSUM: str(zlib.crc32(pixels.data))}
    table = picture_table(pictures, columns).replace_schema_metadata(metadata)
    pixels.tofile(chunk.pixels_file)
    with replacing(chunk.table_file) as temporary:
        pq.write_table(table, temporary)
