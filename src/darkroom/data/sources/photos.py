"""64x64 crops of scikit-learn's two sample photographs: real RGB pixels without a download."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.errors import InputError
from darkroom.files import digest_bytes, digest_json

CLASSES = ["china", "flower"]  # the files' names
SIDE = 64
STRIDE = 8
WIDTH, HEIGHT = 640, 427
# Crops overlap, so the columns are split and not the crops: no pixel is in train and in test.
FIRST_TEST_COLUMN = 512


@dataclass(frozen=True)
class Crops:
    """Crops of photographs in `directory`, uint8 (64, 64, 3): (class, row, column of its corner) for each."""

    directory: str
    corners: list[tuple[int, int, int]]

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        photos: dict[int, NDArray[np.uint8]] = {}
        for label, y, x in self.corners:
            if label not in photos:
                photos[label] = _read(Path(self.directory), CLASSES[label])
            yield photos[label][y : y + SIDE, x : x + SIDE]


def open_photos() -> Source:
    """The source "photos": classes china and flower, 2,622 crops each in train and 414 in test.

    Crops start at every 8th row and column and lie wholly left or right of column 512, where test begins. Raises
    InputError when the library's files are missing or others.
    """
    spec = importlib.util.find_spec("sklearn")  # its import takes a second and is not needed
    if spec is None or spec.submodule_search_locations is None:
        raise InputError("source photos: scikit-learn, whose package holds the photographs, is not installed")
    directory = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
    rows = range(0, HEIGHT - SIDE + 1, STRIDE)
    columns = [x for x in range(0, WIDTH - SIDE + 1, STRIDE) if x + SIDE <= FIRST_TEST_COLUMN or x >= FIRST_TEST_COLUMN]
    corners = [(label, y, x) for label in range(len(CLASSES)) for y in rows for x in columns]
    digests = [digest_bytes(_read(directory, name).tobytes()) for name in CLASSES]
    return Source(
        name="photos",
        form="scikit-learn's sample photographs",
        classes=CLASSES,
        paths=[f"{CLASSES[label]}/{y:03d}-{x:03d}" for label, y, x in corners],
        labels=np.array([label for label, _, _ in corners], dtype=np.int32),
        splits=np.array([TEST if x >= FIRST_TEST_COLUMN else TRAIN for _, _, x in corners], dtype=np.uint8),
        identity=digest_json([digests, corners]),
        part=partial(_part, str(directory), corners),
    )


def _part(directory: str, corners: list[tuple[int, int, int]], start: int, stop: int) -> Crops:
    return Crops(directory, corners[start:stop])


def _read(directory: Path, name: str) -> NDArray[np.uint8]:
    path = directory / f"{name}.jpg"
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise InputError(f"{path}: scikit-learn's photograph cannot be read: {error}") from None
    if pixels.shape != (HEIGHT, WIDTH, 3):
        raise InputError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels; expected {WIDTH}x{HEIGHT}")
    return pixels
