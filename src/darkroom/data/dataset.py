"""Reading what prepare wrote: all that the other stages know about the data. Needs numpy and pydantic alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from darkroom.errors import InputError
from darkroom.files import read_json

SPLITS = ("train", "test")
INFO_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"


class DatasetInfo(BaseModel):
    """`dataset.json`: what the packed arrays hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # the source's: "digits", or the last part of its path
    image_size: int  # pixels, square
    channels: int  # 1 grey, 3 RGB
    classes: list[str]  # names; a label is a position in this list; empty: unlabelled
    splits: dict[str, int]  # "train", "test" -> number of images
    digest: str  # sha256 over the packed images, their labels and the class names


@dataclass(frozen=True)
class Split:
    """The images of one split, in the order of the manifest."""

    images: NDArray[np.uint8]  # (N, C, H, W), 0..255, memory-mapped and read-only
    labels: NDArray[np.int64]  # (N,), 0..num_classes - 1; all 0 when unlabelled


def images_file(split: str) -> str:
    return f"{split}_images.npy"


def labels_file(split: str) -> str:
    return f"{split}_labels.npy"


def load_info(prepared: Path) -> DatasetInfo:
    """Read `dataset.json`. Raises InputError when it is missing or is not what prepare writes."""
    path = prepared / INFO_FILE
    try:
        return DatasetInfo.model_validate(read_json(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the prepare stage writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{path}: {where}: {first['msg']}; run the prepare stage again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run the prepare stage again") from None


def load_split(prepared: Path, split: str) -> Split:
    """Open one split ("train" or "test") without reading its images into memory.

    Raises InputError when a file is missing, is cut short, or does not have the shape, type and labels that
    `dataset.json` declares.
    """
    info = load_info(prepared)
    if split not in info.splits:
        raise InputError(
            f"{prepared / INFO_FILE}: no split {split!r}; expected one of {', '.join(sorted(info.splits))}"
        )
    count = info.splits[split]
    shape = (count, info.channels, info.image_size, info.image_size)
    images = _open(prepared / images_file(split), shape, np.dtype(np.uint8), memory_map=True)
    labels = _open(prepared / labels_file(split), (count,), np.dtype(np.int64), memory_map=False)
    last = max(len(info.classes), 1) - 1
    if count and not 0 <= labels.min() <= labels.max() <= last:
        raise InputError(
            f"{prepared / labels_file(split)}: labels from {labels.min()} to {labels.max()}; "
            f"{INFO_FILE} declares {len(info.classes)} classes, labels 0 to {last}"
        )
    return Split(images, labels)


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], memory_map: bool) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the prepare stage writes it") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run the prepare stage again") from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{path}: {array.dtype} of shape {array.shape}; {INFO_FILE} declares {dtype} of shape {shape}; "
            "run the prepare stage again"
        )
    return array
