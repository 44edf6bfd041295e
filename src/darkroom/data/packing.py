"""Packs a source's images into arrays that can be memory-mapped; the result appears whole or not at all."""

import hashlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from darkroom.data.dataset import INFO_FILE, MANIFEST_FILE, SPLITS, DatasetInfo, images_file, labels_file
from darkroom.data.images import Picture
from darkroom.data.manifest import Row, make_row, write_manifest
from darkroom.data.sources import Source
from darkroom.data.splitting import held_out
from darkroom.errors import InputError
from darkroom.files import digest_json, replacing_directory, write_json
from darkroom.params import DataParams

log = logging.getLogger(__name__)

_AT_ONCE = 256  # images decoded between two writes; bounds the memory
_COPY = 4096  # images copied at once from the spool to a split
_REPORT_SECONDS = 5.0


def pack(source: Source, params: DataParams, prepared: Path) -> DatasetInfo:
    """Decode every image of `source` and write the arrays, the manifest and `dataset.json` to `prepared`.

    Images that cannot be decoded are rows of the manifest and nowhere else. The same images give the same bytes in
    every file. Raises InputError when a class cannot be split.
    """
    with replacing_directory(prepared) as directory:
        spool = directory / "spool"
        rows = _decode_all(source, spool)
        good = [i for i, row in enumerate(rows) if row.decoded]
        _refuse_lost_classes(source, rows)
        digests, labels = [rows[i].sha256 for i in good], [rows[i].label for i in good]
        test = held_out(digests, labels, source.classes, params.test_fraction, params.seed)
        for position, i in enumerate(good):
            rows[i] = replace(rows[i], split="test" if test[position] else "train")

        shape = (params.channels, params.image_size, params.image_size)
        spooled = np.memmap(spool, dtype=np.uint8, mode="r", shape=(len(good), *shape))
        content = {}
        for split in SPLITS:
            chosen = np.flatnonzero(test == (split == "test"))
            content[split] = {
                "images": _write_images(directory / images_file(split), spooled, chosen),
                "labels": _write_labels(directory / labels_file(split), np.array(labels, dtype=np.int64)[chosen]),
            }
        del spooled
        spool.unlink()

        info = DatasetInfo(
            name=source.name,
            image_size=params.image_size,
            channels=params.channels,
            classes=source.classes,
            splits={split: sum(row.split == split for row in rows) for split in SPLITS},
            digest=digest_json({"classes": source.classes, "shape": shape, "content": content}),
        )
        write_manifest(directory / MANIFEST_FILE, rows)
        write_json(directory / INFO_FILE, info.model_dump())
    return info


def _decode_all(source: Source, spool: Path) -> list[Row]:
    """A row per image in the source's order; the pixels of those that decode go to `spool`, one after the other."""
    rows: list[Row] = []
    total, start = len(source.paths), time.monotonic()
    reported = start
    # Pillow lets go of the interpreter while it decodes and resizes, so threads are enough.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads, spool.open("wb") as file:
        for first in range(0, total, _AT_ONCE):
            indices = range(first, min(first + _AT_ONCE, total))
            for i, picture in zip(indices, threads.map(source.read, indices), strict=True):
                rows.append(make_row(source.paths[i], source.labels[i], source.classes[source.labels[i]], picture))
                _spool(file, picture)
            now = time.monotonic()
            if now - reported >= _REPORT_SECONDS:
                log.info("%s of %s images, %.0f images/s", f"{len(rows):,}", f"{total:,}", len(rows) / (now - start))
                reported = now
    return rows


def _spool(file: BinaryIO, picture: Picture) -> None:
    if picture.pixels is not None:
        file.write(picture.pixels.tobytes())


def _refuse_lost_classes(source: Source, rows: list[Row]) -> None:
    alive = {row.label for row in rows if row.decoded}
    for label, name in enumerate(source.classes):
        if label not in alive:
            first = next(row for row in rows if row.label == label)
            count = sum(row.label == label for row in rows)
            raise InputError(
                f"{source.name}: class {name}: none of its {count} images can be decoded; {first.path}: {first.error}"
            )


def _write_images(path: Path, spooled: NDArray[np.uint8], chosen: NDArray[np.intp]) -> str:
    """Write the chosen images as an .npy file of shape (N, C, H, W); gives the sha256 of their pixels."""
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *spooled.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(chosen), _COPY):
            block = spooled[chosen[first : first + _COPY]].tobytes()
            hasher.update(block)
            file.write(block)
    return hasher.hexdigest()


def _write_labels(path: Path, labels: NDArray[np.int64]) -> str:
    np.save(path, labels, allow_pickle=False)
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
