"""One image file, decoded in full and brought to the declared form; what is wrong with it is data, not an exception."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from darkroom.files import digest_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# A file of a few kilobytes can declare an image of many gigabytes; nothing above this is decompressed.
MAX_PIXELS = 1 << 26  # 8192 x 8192

# EDM's and ADM's data sets were resized with Lanczos; Pillow widens the filter when it shrinks, so it does not alias.
RESAMPLING = Image.Resampling.LANCZOS

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Picture:
    """An image as it was read. With an `error` there are no pixels, and the rest is as far as it was known."""

    pixels: NDArray[np.uint8] | None  # (C, H, W), 0..255
    format: str  # of the file: PNG, JPEG, …; empty when unknown
    mode: str  # Pillow's name for the file's pixels: L, RGB, RGBA, P, …; empty when unknown
    width: int | None  # of the source image, upright, in pixels
    height: int | None
    bytes: int  # of the file
    sha256: str  # of the file
    error: str = ""


def decode(content: bytes, image_size: int, channels: int) -> Picture:
    """Decode a PNG, JPEG, WebP or BMP and bring it to (channels, image_size, image_size).

    In this order: the camera's rotation (EXIF) is applied, transparency is composited on white, colours are converted
    (grey by ITU-R 601 luma), the centre square is cut out, and it is resized with antialiasing. Of an animation the
    first frame counts. Never raises for what the bytes hold: the reason is in `error`.
    """
    known: dict[str, Any] = {"format": "", "mode": "", "width": None, "height": None}
    try:
        pixels = _decode(content, image_size, channels, known)
        error = ""
    except MemoryError:
        raise
    except Exception as reason:  # decoders of hostile bytes raise almost anything: OSError, SyntaxError, struct.error …
        pixels, error = None, _explain(reason)
    return Picture(pixels=pixels, bytes=len(content), sha256=digest_bytes(content), error=error, **known)


def _decode(content: bytes, image_size: int, channels: int, known: dict[str, Any]) -> NDArray[np.uint8]:
    if not content:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        known.update(format=image.format, mode=image.mode, width=image.width, height=image.height)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
        if image.format == "PNG":
            image.verify()  # decoding alone does not check the checksums of the pixel data
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    known.update(width=upright.width, height=upright.height)
    return fit(_to_mode(upright, "L" if channels == 1 else "RGB"), image_size)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """8 bits per channel, no transparency."""
    if image.mode in _SIXTEEN_BIT:  # Pillow's own conversion to 8 bits clips at 255
        image = Image.fromarray(np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; expected 8 or 16 bits per channel")
    if image.has_transparency_data:
        # White is the page that cut-outs and drawings are made for; on black, dark strokes would vanish.
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def fit(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """The centre square of an L or RGB image, resized to uint8 (C, image_size, image_size) when it has another size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: resize(box=…) would let the filter reach over the cut.
    image = image.crop((left, top, left + side, top + side))
    if side != image_size:
        image = image.resize((image_size, image_size), RESAMPLING)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _explain(reason: Exception) -> str:
    if type(reason).__name__ == "UnidentifiedImageError":
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    text = " ".join(str(reason).split())
    return text or type(reason).__name__
