"""Packs a source's images into arrays that can be memory-mapped; the result appears whole or not at all.

Images are decoded in chunks, by several processes, into files beside the project's other local state. A run that was
killed finds the chunks that are whole and makes the others; when all are there they are dealt to the splits in order.
"""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from numpy.typing import NDArray

from darkroom.data.chunks import Chunk, make_chunk
from darkroom.data.dataset import INFO_FILE, MANIFEST_FILE, SPLITS, DatasetInfo, images_file, labels_file
from darkroom.data.manifest import complete, write_manifest
from darkroom.data.sources import TRAIN, Source
from darkroom.data.splitting import held_out
from darkroom.data.statistics import STATISTICS_FILE, DataStatistics, write_statistics
from darkroom.data.workers import in_processes, worker_count
from darkroom.errors import InputError, StageFailed
from darkroom.files import alone_in, digest_json, digest_tree, replacing_directory, write_json
from darkroom.params import DataParams
from darkroom.progress import progress

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 1 << 24  # of packed pixels
_CHUNK_IMAGES = (16, 4096)  # at least, at most

# What decides the content of a chunk, given an image's bytes.
_CODE = [Path(__file__).with_name(f"{name}.py") for name in ("chunks", "images", "manifest", "perceptual")]


def pack(source: Source, params: DataParams, prepared: Path, scratch: Path) -> DatasetInfo:
    """Decode every image of `source` and write arrays, manifest, statistics and `dataset.json` to `prepared`.

    Images that cannot be decoded are rows of the manifest and nowhere else. The same images give the same bytes in
    every file. `scratch` holds chunks until the end, and is emptied then. Raises InputError when a class cannot be
    split, StageFailed when another process is at work or the disk is too small.
    """
    with locked(scratch):
        chunks = _plan(source, params, scratch)
        _decode(source, chunks, scratch)
        with replacing_directory(prepared) as directory:
            info = _assemble(source, params, chunks, directory)
        for path in scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return info


def locked(scratch: Path) -> AbstractContextManager[None]:
    """Keep every other process from preparing with the same scratch directory. Raises StageFailed."""
    return alone_in(scratch, StageFailed(f"{scratch}: another process is preparing data here; wait for it, or end it"))


def _plan(source: Source, params: DataParams, scratch: Path) -> list[tuple[Chunk, range]]:
    """The chunks with the images of each. Chunks of other images, sizes or code are deleted."""
    size, channels = params.image_size, params.channels
    least, most = _CHUNK_IMAGES
    images = min(max(CHUNK_BYTES // (channels * size * size), least), most)
    key = {
        "code": digest_tree(Path(__file__).parent, _CODE),
        "decoder": PIL.__version__,
        "images": images,
        "shape": [channels, size],
        "source": source.identity,
    }
    directory = scratch / f"chunks-{digest_json(key)[:16]}"
    for stale in scratch.glob("chunks-*"):
        if stale != directory:
            shutil.rmtree(stale)
    directory.mkdir(exist_ok=True)
    for left_by_a_kill in directory.glob(".*.tmp"):
        left_by_a_kill.unlink()
    total = len(source.paths)
    return [
        (Chunk(directory, number, size, channels), range(first, min(first + images, total)))
        for number, first in enumerate(range(0, total, images))
    ]


def _decode(source: Source, chunks: list[tuple[Chunk, range]], scratch: Path) -> None:
    """Make the chunks that are not there."""
    missing = [(chunk, images) for chunk, images in chunks if not chunk.is_whole()]
    total = len(source.paths)
    done = total - sum(len(images) for _, images in missing)
    _refuse_small_disk(chunks[0][0], total, total - done, scratch)
    jobs = ((chunk, source.part(images.start, images.stop), len(images)) for chunk, images in missing)
    made = in_processes(make_chunk, jobs, min(worker_count(), len(missing)))
    with progress("preparing", total, "images") as advance, closing(made):
        if done:
            advance.begin(done)
            advance(done, "made before an interruption")
        for count in made:
            done += count
            advance(done)


def _refuse_small_disk(chunk: Chunk, total: int, missing: int, scratch: Path) -> None:
    """Chunks and arrays are both there at the end; better said now than after hours."""
    needed = (total + missing) * chunk.channels * chunk.image_size**2
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise StageFailed(
            f"{scratch}: {free / 1e9:.1f} GB free; packing {total:,} images needs {needed / 1e9:.1f} GB, half of "
            "it until it is done; DARKROOM_STATE moves this directory"
        )


def _assemble(source: Source, params: DataParams, chunks: list[tuple[Chunk, range]], directory: Path) -> DatasetInfo:
    """Write everything from the chunks, one at a time."""
    import pyarrow as pa

    read = pa.concat_tables([chunk.table() for chunk, _ in chunks])
    decoded = read["decoded"].to_numpy()
    _refuse_lost_classes(source, read, decoded)
    splits = _split(source, params, read, decoded)
    shape = (params.channels, params.image_size, params.image_size)
    counts = {split: int((splits == number).sum()) for number, split in enumerate(SPLITS)}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_ImagesWriter(directory / images_file(split), (counts[split], *shape)))
            for split in SPLITS
        ]
        advance = stack.enter_context(progress("packing", chunks[-1][1].stop, "images"))
        for chunk, images in chunks:
            pixels = chunk.pixels()
            own = splits[images.start : images.stop][decoded[images.start : images.stop]]
            for number, writer in enumerate(writers):
                writer.write(pixels, own == number)
            advance(images.stop)
    content = {
        split: {
            "images": writers[number].digest(),
            "labels": _write_labels(directory / labels_file(split), source.labels[splits == number]),
        }
        for number, split in enumerate(SPLITS)
    }
    info = DatasetInfo(
        name=source.name,
        image_size=params.image_size,
        channels=params.channels,
        classes=source.classes,
        splits=counts,
        digest=digest_json({"classes": source.classes, "shape": shape, "content": content}),
    )
    write_manifest(directory / MANIFEST_FILE, complete(read, source.paths, source.labels, source.classes, splits))
    per_class = np.bincount(source.labels[decoded], minlength=len(source.classes)).tolist()
    moments = np.sum([chunk.moments() for chunk, _ in chunks], axis=0)
    statistics = DataStatistics(
        name=info.name,
        digest=info.digest,
        image_size=info.image_size,
        channels=info.channels,
        classes=dict(zip(source.classes, per_class, strict=False)),  # of unlabelled data: none
        images=int(decoded.sum()),
        sums=moments[0].tolist(),
        squares=moments[1].tolist(),
    )
    write_statistics(directory / STATISTICS_FILE, statistics)
    write_json(directory / INFO_FILE, info.model_dump())
    return info


def _split(source: Source, params: DataParams, read: pa.Table, decoded: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A position in ("train", "test", "none") per image."""
    splits = np.full(len(decoded), 2, dtype=np.uint8)
    if params.test_fraction is None:
        assert source.splits is not None  # open_source refuses it
        splits[decoded] = source.splits[decoded]
        in_train = np.bincount(source.labels[splits == TRAIN], minlength=len(source.classes))
        if lost := [name for name, count in zip(source.classes, in_train, strict=False) if not count]:
            raise InputError(f"{source.name}: class {lost[0]}: none of its images is in the source's own train split")
    else:
        digests = np.asarray(read["sha256"].to_numpy(), dtype="S64")[decoded]
        classes = source.classes or ["(unlabelled)"]
        splits[decoded] = held_out(digests, source.labels[decoded], classes, params.test_fraction, params.seed)
    return splits


def _refuse_lost_classes(source: Source, read: pa.Table, decoded: NDArray[np.bool_]) -> None:
    alive = np.bincount(source.labels[decoded], minlength=max(len(source.classes), 1))
    for label in np.flatnonzero(alive == 0).tolist():
        members = np.flatnonzero(source.labels == label)
        name = f"{source.name}: class {source.classes[label]}" if source.classes else source.name
        if not len(members):
            raise InputError(f"{name}: no images have this label")
        error = read["error"][int(members[0])].as_py()
        raise InputError(
            f"{name}: none of its {len(members)} images can be decoded; {source.paths[members[0]]}: {error}"
        )


class _ImagesWriter:
    """Writes an .npy file of shape (N, C, H, W) piece by piece, and the sha256 of its pixels."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._hasher = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)  # hashes while the other one writes
        self._buffer = np.empty((0, *shape[1:]), dtype=np.uint8)  # kept: new memory costs more than its use
        self._file = path.open("wb")
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> _ImagesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, pixels: NDArray[np.uint8], chosen: NDArray[np.bool_]) -> None:
        """Those of the `pixels` (N, C, H, W) that are `chosen` (N,)."""
        if len(pixels) > len(self._buffer):
            self._buffer = np.empty(pixels.shape, dtype=np.uint8)
        content = np.compress(chosen, pixels, axis=0, out=self._buffer[: int(chosen.sum())]).data
        hashed = self._thread.submit(self._hasher.update, content)
        self._file.write(content)
        hashed.result()

    def digest(self) -> str:
        return self._hasher.hexdigest()


def _write_labels(path: Path, labels: NDArray[np.int32]) -> str:
    np.save(path, labels.astype(np.int64), allow_pickle=False)
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
