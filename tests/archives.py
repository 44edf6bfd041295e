"""Tiny data sets in the exact forms in which the field's are published. Contents are random; functions write files."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (N, H, W, 3)

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def random_pixels(count: int, side: int = 32, seed: int = 0) -> Pixels:
    """(count, side, side, 3), all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def planar(pixels: Pixels) -> NDArray[np.uint8]:
    """(N, 3 * H * W): red, green and blue one after the other, as CIFAR and downsampled ImageNet store them."""
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


def cifar10(
    batches: Sequence[tuple[Pixels, Sequence[int]]],
    test: tuple[Pixels, Sequence[int]],
    names: Sequence[str] = CIFAR10_NAMES,
) -> dict[str, bytes]:
    """CIFAR-10's binary version: content by path. Pixels are (N, 32, 32, 3), labels start with 0."""
    files = {f"data_batch_{number}.bin": batch for number, batch in enumerate(batches, 1)} | {"test_batch.bin": test}
    content = {
        file: np.hstack([np.array(labels, dtype=np.uint8)[:, None], planar(pixels)]).tobytes()
        for file, (pixels, labels) in files.items()
    }
    content["batches.meta.txt"] = "".join(f"{name}\n" for name in names).encode() + b"\n"  # as published
    content["readme.html"] = b"<meta HTTP-EQUIV=REFRESH CONTENT='0; url=http://www.cs.toronto.edu/~kriz/cifar.html'>\n"
    return {f"cifar-10-batches-bin/{file}": value for file, value in content.items()}


def cifar100(
    train: tuple[Pixels, Sequence[int]], test: tuple[Pixels, Sequence[int]], names: Sequence[str]
) -> dict[str, bytes]:
    """CIFAR-100's binary version: content by path. Labels are the fine ones; the coarse one is fine // 5."""
    content = {}
    for file, (pixels, labels) in {"train.bin": train, "test.bin": test}.items():
        fine = np.array(labels, dtype=np.uint8)[:, None]
        content[file] = np.hstack([fine // 5, fine, planar(pixels)]).tobytes()
    content["fine_label_names.txt"] = "".join(f"{name}\n" for name in names).encode()
    content["coarse_label_names.txt"] = "".join(f"group{number}\n" for number in range(-(-len(names) // 5))).encode()
    return {f"cifar-100-binary/{file}": value for file, value in content.items()}


def write_tar(path: Path, files: Mapping[str, bytes], others: Sequence[tarfile.TarInfo] = ()) -> Path:
    """A tar, gzipped unless the name ends in .tar: directories, files, and then `others` without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for directory in sorted({file.split("/")[0] for file in files if "/" in file} - {"", ".."}):
            entry = tarfile.TarInfo(f"{directory}/")
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for file, content in files.items():
            entry = tarfile.TarInfo(file)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in others:
            archive.addfile(entry)
    return path


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """The same files below a folder."""
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    return root


def write_imagenet64(
    root: Path,
    batches: Sequence[tuple[Pixels, Sequence[int]]],
    val: tuple[Pixels, Sequence[int]] | None,
    names: Sequence[str] | None = None,
    compressed: bool = False,
) -> Path:
    """Downsampled ImageNet: npz batches in `root`, with labels from 1; with `names` the map of classes beside them."""
    root.mkdir(parents=True, exist_ok=True)
    save = np.savez_compressed if compressed else np.savez
    for number, (pixels, labels) in enumerate(batches, 1):
        data = planar(pixels)
        arrays = {"data": data, "labels": np.array(labels, dtype=np.int64), "mean": data.mean(axis=0)}
        save(root / f"train_data_batch_{number}.npz", **arrays)
    if val is not None:
        save(root / "val_data.npz", data=planar(val[0]), labels=np.array(val[1], dtype=np.int64))
    if names is not None:
        lines = [f"n{number:08d} {number} {name}\n" for number, name in enumerate(names, 1)]
        (root / "map_clsloc.txt").write_text("".join(lines))
    return root


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of (H, W, 3) or (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def hub_features(names: Sequence[str] | None, image: str = "image", label: str = "label") -> dict[str, object]:
    """The hub's description of an image classification data set; without `names` of an unlabelled one."""
    features: dict[str, object] = {image: {"_type": "Image"}}
    return features if names is None else features | {label: {"names": list(names), "_type": "ClassLabel"}}


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None,
    features: Mapping[str, object] | None,
    row_group: int = 100,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """A file as the hub's library writes it: struct<bytes, path>, int64 labels, `features` in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {columns[0]: pa.array(structs, kind)}
    if labels is not None:
        arrays[columns[1]] = pa.array(labels, pa.int64())
    table = pa.table(arrays)
    if features is not None:
        metadata = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=row_group)
    return path
