"""One image, decoded in full and brought to the declared form; what is wrong with it is data, not an exception."""

import io
import struct
import zlib
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
MAX_BYTES = 1 << 28  # of a file: nothing above this is read

# EDM's and ADM's data sets were resized with Lanczos; Pillow widens the filter when it shrinks, so it does not alias.
RESAMPLING = Image.Resampling.LANCZOS

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Unreadable:
    """In place of an image's content: why there is none."""

    reason: str
    bytes: int = 0  # of the file, as far as that is known


# What a source gives for an image: the bytes of a PNG, JPEG, WebP or BMP file; pixels, uint8 (H, W) or (H, W, 3); or
# why it has neither.
Content = bytes | NDArray[np.uint8] | Unreadable


@dataclass(slots=True)
class Picture:
    """An image as it was read. With an `error` there are no pixels, and the rest is as far as it was known."""

    pixels: NDArray[np.uint8] | None  # (C, H, W), 0..255
    format: str  # of the file: PNG, JPEG, …; array for pixels; empty when unknown
    mode: str  # Pillow's name for the file's pixels: L, RGB, RGBA, P, …; empty when unknown
    width: int | None  # of the source image, upright, in pixels
    height: int | None
    bytes: int  # of the file
    sha256: str  # of the file, or of the pixels in the order in which they came
    error: str = ""


def decode(content: Content, image_size: int, channels: int) -> Picture:
    """Decode an image and bring it to (channels, image_size, image_size).

    In this order: the camera's rotation (EXIF) is applied, transparency is composited on white, colours are converted
    (grey by ITU-R 601 luma), the centre square is cut out, and it is resized with antialiasing. Of an animation the
    first frame counts. Never raises for what the content holds: the reason is in `error`.
    """
    if isinstance(content, Unreadable):
        return Picture(None, "", "", None, None, content.bytes, digest_bytes(b""), content.reason)
    known: dict[str, Any] = {"format": "", "mode": "", "width": None, "height": None}
    try:
        image = _decode(content, known) if isinstance(content, bytes) else _from_pixels(content, known)
        pixels = fit(_to_mode(image, "L" if channels == 1 else "RGB"), image_size)
        error = ""
    except MemoryError:
        raise
    except Exception as reason:  # decoders of hostile bytes raise almost anything: OSError, SyntaxError, struct.error …
        pixels, error = None, _explain(reason)
    if not isinstance(content, bytes):
        content = np.ascontiguousarray(content).tobytes()
    return Picture(pixels=pixels, bytes=len(content), sha256=digest_bytes(content), error=error, **known)


def _decode(content: bytes, known: dict[str, Any]) -> Image.Image:
    if not content:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        known.update(format=image.format, mode=image.mode, width=image.width, height=image.height)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
        if image.format == "PNG":
            _check_png(content)
        image.load()
        if not image.getexif():
            return image
        upright = ImageOps.exif_transpose(image)
    known.update(width=upright.width, height=upright.height)
    return upright


def _check_png(content: bytes) -> None:
    """Every chunk's checksum up to the end; decoding alone skips those of the pixel data. Raises ValueError.

    Pillow's own `verify` does the same in ten times the time and leaves an image that has to be opened again.
    """
    position = len(_PNG_SIGNATURE)
    view = memoryview(content)
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise ValueError(f"broken PNG file: wrong checksum of chunk {kind.decode('ascii', 'backslashreplace')}")
        if kind == b"IEND":
            return
        position = end + 4
    raise ValueError("truncated PNG file")


def _from_pixels(pixels: NDArray[np.uint8], known: dict[str, Any]) -> Image.Image:
    image = Image.fromarray(pixels)
    known.update(format="array", mode=image.mode, width=image.width, height=image.height)
    return image


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
    return image if image.mode == mode else image.convert(mode)


def fit(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """The centre square of an L or RGB image, resized to uint8 (C, image_size, image_size) when it has another size."""
    side = min(image.size)
    if image.width != image.height:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cropped first: resize(box=…) would let the filter reach over the cut.
        image = image.crop((left, top, left + side, top + side))
    if side != image_size:
        image = image.resize((image_size, image_size), RESAMPLING)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _explain(reason: Exception) -> str:
    if type(reason).__name__ == "UnidentifiedImageError":
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    text = " ".join(str(reason).split())
    return text or type(reason).__name__
