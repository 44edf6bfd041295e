"""Decoding: against Pillow's own operations."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from darkroom.data.images import MAX_PIXELS, decode, fit


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


def test_pixels_of_native_size_are_untouched() -> None:
    image = noise(8, 8)
    picture = decode(encode(image), 8, 1)
    assert picture.error == ""
    assert picture.pixels is not None
    np.testing.assert_array_equal(picture.pixels, np.asarray(image)[None])
    assert (picture.format, picture.mode, picture.width, picture.height) == ("PNG", "L", 8, 8)


def test_centre_is_cropped_then_resized_like_pillow() -> None:
    image = noise(40, 61, 3)
    picture = decode(encode(image), 16, 3)
    expected = image.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(picture.pixels, np.asarray(expected).transpose(2, 0, 1))


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    shrunk = fit(Image.fromarray(stripes), 8)
    # Nearest or bilinear without a wider filter gives all black or all white; the edges ring a little.
    assert np.abs(shrunk - 127.5).max() < 8


def test_grey_is_rec_601_luma_and_grey_to_colour_is_three_equal_planes() -> None:
    image = noise(8, 8, 3)
    grey = decode(encode(image), 8, 1).pixels
    expected = np.asarray(image, dtype=np.float64) @ np.array([0.299, 0.587, 0.114])
    assert grey is not None
    assert np.abs(grey[0] - expected).max() <= 1
    colour = decode(encode(noise(8, 8)), 8, 3).pixels
    assert colour is not None
    np.testing.assert_array_equal(colour, np.repeat(np.asarray(noise(8, 8))[None], 3, axis=0))


def test_camera_rotation_is_applied() -> None:
    image = noise(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    picture = decode(encode(image, exif=exif), 8, 1)
    expected = fit(image.transpose(Image.Transpose.ROTATE_270), 8)
    np.testing.assert_array_equal(picture.pixels, expected)
    assert (picture.width, picture.height) == (8, 12)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 10, 10, 200, 200, 200])
        content = encode(image, transparency=0)
    else:
        content = encode(Image.new(mode, (8, 8), (10, 0) if mode == "LA" else (10, 10, 10, 0)))
    picture = decode(content, 8, 1)
    assert picture.pixels is not None
    assert (picture.pixels == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    picture = decode(encode(Image.fromarray(levels)), 8, 1)
    assert picture.pixels is not None
    np.testing.assert_array_equal(picture.pixels[0], np.round(levels / 257).astype(np.uint8))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_file_is_an_error_with_a_reason(form: str) -> None:
    content = encode(noise(64, 64, 3), form)
    assert decode(content, 8, 3).error == ""
    cut = decode(content[: len(content) // 2], 8, 3)
    assert cut.pixels is None
    assert cut.error
    assert cut.bytes == len(content) // 2


def test_flipped_bit_in_png_pixels_is_found() -> None:
    content = bytearray(encode(noise(64, 64)))
    content[len(content) // 2] ^= 1
    assert decode(bytes(content), 8, 1).error


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [8193, 20000, 60000])
def test_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )
    assert side * side > MAX_PIXELS
    picture = decode(bomb, 8, 1)
    assert picture.pixels is None
    assert "limit" in picture.error


@pytest.mark.parametrize(
    "content", [b"", b"not an image", encode(Image.new("L", (8, 8)), "GIF"), b"\x89PNG\r\n\x1a\n" + b"\0" * 40]
)
def test_anything_else_is_an_error_in_one_line(content: bytes) -> None:
    picture = decode(content, 8, 1)
    assert picture.pixels is None
    assert picture.error
    assert "\n" not in picture.error
    assert "BytesIO" not in picture.error
