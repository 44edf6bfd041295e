"""scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits): 1,797 scans of 8x8."""

import functools

import numpy as np
from numpy.typing import NDArray

from darkroom.data.sources import Source
from darkroom.files import digest_bytes

_LEVELS = 16  # the scans hold 0..16


def open_digits() -> Source:
    """The source "digits": grey, 8x8, ten classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 0..16 to 0..255 by v * 255 / 16, rounded; the one tie, 8 -> 127.5, goes to 128.
    scans = np.round(bunch.images * 255 / _LEVELS).astype(np.uint8)
    classes = [str(name) for name in bunch.target_names]
    # Sorted by class, as a folder's images are; the path is the scan's number in the library.
    order = np.argsort(bunch.target, kind="stable")
    labels = bunch.target[order].astype(np.int32)
    return Source(
        name="digits",
        form="scikit-learn's digits",
        classes=classes,
        paths=[f"{classes[label]}/{scan:04d}" for label, scan in zip(labels, order, strict=True)],
        labels=labels,
        splits=None,
        identity=digest_bytes(scans[order].tobytes()),
        part=functools.partial(_part, scans[order]),
    )


def _part(scans: NDArray[np.uint8], start: int, stop: int) -> list[NDArray[np.uint8]]:
    return list(scans[start:stop])
