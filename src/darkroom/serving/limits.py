"""How much one request may ask for: the model's own limits, or those of the operator who serves it."""

import os
from dataclasses import dataclass
from typing import Self

from darkroom.errors import InputError

# Six full requests at 20 guided steps: whoever wants 256 images gets them at up to 125, and 32 at DDPM's 1,000.
_MAX_IMAGES, _MAX_WORK = 256, 256 * 250


@dataclass(frozen=True)
class Limits:
    """Of one request. Its work is in rows that pass through the network: images x evaluations, twice if guided."""

    max_images: int = _MAX_IMAGES
    max_work: int = _MAX_WORK

    @classmethod
    def from_environment(cls) -> Self:
        """`DARKROOM_MAX_IMAGES` and `DARKROOM_MAX_WORK`. Raises InputError unless they are whole numbers from 1."""
        return cls(_read("DARKROOM_MAX_IMAGES", _MAX_IMAGES), _read("DARKROOM_MAX_WORK", _MAX_WORK))

    def check_images(self, images: int) -> None:
        """Raise InputError for more rows than one request may have."""
        if images > self.max_images:
            raise InputError(f"{images} rows: expected at most {self.max_images} in one request")

    def check_work(self, images: int, evaluations: int, guided: bool) -> None:
        """Raise InputError for `images` of so many network evaluations each if that is too much for one request."""
        work = images * evaluations * (2 if guided else 1)
        if work > self.max_work:
            twice = " x 2 for guidance" if guided else ""
            raise InputError(
                f"{images} images x {evaluations} network evaluations{twice} = {work}: expected at most "
                f"{self.max_work} in one request; ask for fewer images or steps"
            )


def _read(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise InputError(f"{name} = {text!r}: expected a whole number, at least 1")
    return int(text)
