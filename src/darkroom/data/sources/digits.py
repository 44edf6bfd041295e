"""scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits): 1,797 scans of 8x8."""

import numpy as np
from PIL import Image

from darkroom.data.images import Picture, fit
from darkroom.files import digest_bytes

NATIVE_SIZE = 8
_LEVELS = 16  # the scans hold 0..16


class Digits:
    """The source "digits"."""

    def __init__(self, image_size: int, channels: int) -> None:
        from sklearn.datasets import load_digits

        if channels != 1:
            raise ValueError(f"the digits are grey, got channels = {channels}")
        bunch = load_digits()
        # 0..16 to 0..255 by v * 255 / 16, rounded; the one tie, 8 -> 127.5, goes to 128.
        self._scans = np.round(bunch.images * 255 / _LEVELS).astype(np.uint8)
        self._image_size = image_size
        self.name = "digits"
        self.classes = [str(name) for name in bunch.target_names]
        targets = [int(label) for label in bunch.target]
        # Sorted by class, as a folder's images are; the path is the scan's number in the library.
        self._order = sorted(range(len(targets)), key=lambda scan: (targets[scan], scan))
        self.labels = [targets[scan] for scan in self._order]
        self.paths = [f"{self.classes[targets[scan]]}/{scan:04d}" for scan in self._order]

    def read(self, index: int) -> Picture:
        """Scan `index`; its digest is that of its 64 pixels."""
        scan = self._scans[self._order[index]]
        content = scan.tobytes()
        return Picture(
            pixels=fit(Image.fromarray(scan), self._image_size),
            format="array",
            mode="L",
            width=NATIVE_SIZE,
            height=NATIVE_SIZE,
            bytes=len(content),
            sha256=digest_bytes(content),
        )
