"""Bad files in a folder with a directory per class."""

import io
import os
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.corpus.cases import Case, Project


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(9).integers(0, 256, shape, dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, data: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def palette(project: Project) -> None:
    project.change("validate", modes=None)
    project.add(encoded(noise(8, 8).convert("P")))


def animated() -> bytes:
    frames = [noise(8, 8), Image.new("L", (8, 8), 3)]
    return encoded(frames[0], save_all=True, append_images=frames[1:])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(8, 12), exif=exif)


def pipe(project: Project) -> None:
    os.mkfifo(project.images / "ant" / "bad.png")


def looping(project: Project) -> None:
    (project.images / "ant" / "bad.png").symlink_to("bad.png")


def circle(project: Project) -> None:
    (project.images / "ant" / "up").symlink_to("..")


def dangling(project: Project) -> None:
    (project.images / "cow").symlink_to("nowhere")


def not_utf8(project: Project) -> None:
    source = os.fsencode(project.images / "ant" / "0.png")
    os.rename(source, os.path.join(os.fsencode(project.images / "ant"), b"caf\xe9.png"))  # noqa: PTH104, PTH118


def odd_names(project: Project) -> None:
    (project.images / "ant" / "0.png").rename(project.images / "ant" / "a\nb <img src=x> \x1b[31m.png")
    project.add(b"no image", "ant/c\nd.png")


def across_splits(project: Project) -> None:
    for split in ("train", "test"):
        (project.images / split).mkdir()
    for name in ("ant", "bee"):
        (project.images / "test" / name).mkdir()
        for i in (0, 1):
            (project.images / name / f"{i}.png").rename(project.images / "test" / name / f"{i}.png")
        (project.images / name).rename(project.images / "train" / name)
    copy = (project.images / "train" / "ant" / "2.png").read_bytes()
    (project.images / "test" / "bee" / "copy.png").write_bytes(copy)
    project.change("data", test_fraction=None)


def twice(project: Project) -> None:
    project.add((project.images / "ant" / "0.png").read_bytes(), "ant/copy.png")


def nearly_twice(project: Project) -> None:
    pixels = np.asarray(Image.open(project.images / "ant" / "0.png")).copy()
    pixels[0, 0] ^= 1
    project.add(encoded(Image.fromarray(pixels)), "ant/near.png")


def no_images(project: Project) -> None:
    (project.images / "cow").mkdir()
    (project.images / "cow" / "notes.txt").write_text("x")
    project.change("data", num_classes=3)


def one_image(project: Project) -> None:
    (project.images / "cow").mkdir()
    project.image(2, 0).save(project.images / "cow" / "0.png")
    project.change("data", num_classes=3)


def all_bad(project: Project) -> None:
    for file in (project.images / "bee").iterdir():
        file.write_bytes(b"")


def stray(project: Project) -> None:
    (project.images / "stray.png").write_bytes(encoded(noise(8, 8)))


def one_colour(project: Project) -> None:
    for file in project.images.rglob("*.png"):
        Image.open(file).convert("RGB").save(file)
    project.add(encoded(Image.new("RGB", (8, 8), (9, 90, 200))))
    project.change("data", channels=3)
    project.change("validate", modes=["RGB"])


def grey_among_colour(project: Project) -> None:
    for file in project.images.rglob("*.png"):
        Image.open(file).convert("RGB").save(file)
    project.add(encoded(noise(8, 8)))
    project.change("data", channels=3)
    project.change("validate", modes=["RGB"])


def unbalanced(project: Project) -> None:
    for i in range(30):
        project.image(3, i).save(project.images / "ant" / f"more-{i}.png")


def empty_folder(project: Project) -> None:
    project.change("data", source="data/raw/empty")
    (project.root / "data" / "raw" / "empty").mkdir()


def missing_folder(project: Project) -> None:
    project.change("data", source="data/raw/imagse")


def huge_file(project: Project) -> None:
    with (project.images / "ant" / "bad.png").open("wb") as file:
        file.truncate(1 << 33)  # a hole: no byte on the disk


def add(content: bytes, name: str = "ant/bad.png") -> Callable[[Project], None]:
    return lambda project: project.add(content, name)


JPEG = encoded(noise(64, 64), "JPEG")
SIXTEEN_BIT = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999)
CMYK = encoded(Image.new("CMYK", (8, 8), (9, 80, 7, 6)), "JPEG")
BOMB = png(60000, zlib.compress(bytes(10_000_000)))
MODES = r"modes_known.*ant/bad"
CASES = [
    Case("truncated PNG", "listed", r"ant/bad\.png \(.*truncated", add(encoded(noise(64, 64))[:1500])),
    Case("truncated JPEG", "listed", r"ant/bad\.jpg \(.*truncated", add(JPEG[:900], "ant/bad.jpg")),
    Case("flipped bit in a PNG", "listed", r"ant/bad\.png \(broken PNG", add(flipped(encoded(noise(64, 64))))),
    Case("empty file", "listed", r"ant/bad\.png \(the file is empty\)", add(b"")),
    Case("text renamed to .png", "listed", r"ant/bad\.png \(not a PNG", add(b"hello\n" * 100)),
    Case("GIF renamed to .png", "listed", r"ant/bad\.png \(not a PNG", add(encoded(noise(8, 8), "GIF"))),
    Case("TIFF renamed to .png", "listed", r"ant/bad\.png \(not a PNG", add(encoded(noise(8, 8).convert("F"), "TIFF"))),
    Case("JPEG renamed to .png", "accepted", "ant/bad", add(encoded(noise(8, 8), "JPEG"))),
    Case("16-bit grey", "found", MODES, add(encoded(SIXTEEN_BIT))),
    Case("palette, any mode allowed", "accepted", "ant/bad", palette),
    Case("CMYK JPEG", "found", MODES, add(CMYK, "ant/bad.jpg")),
    Case("colour among grey", "found", MODES, add(encoded(noise(8, 8, 3)))),
    Case("grey among RGB", "found", MODES, grey_among_colour),
    Case("transparent", "found", MODES, add(encoded(noise(8, 8, 4)))),
    Case("animated PNG", "accepted", "ant/bad", add(animated())),
    Case("turned by EXIF", "accepted", "ant/bad", add(rotated())),
    Case("decompression bomb", "listed", r"ant/bad\.png \(.*limit", add(BOMB)),
    Case("PNG of no pixels", "listed", r"ant/bad\.png \(", add(png(0, zlib.compress(b"")))),
    Case("8 GiB file", "listed", r"ant/bad\.png \(8,589,934,592 bytes, over the limit", huge_file),
    Case("1x1 image", "found", r"few_constant.*ant/bad", add(encoded(noise(1, 1)))),
    Case("small image", "warned", r"not_enlarged", add(encoded(noise(5, 5)))),
    Case("pipe in place of a file", "listed", r"ant/bad\.png \(not a regular file\)", pipe),
    Case("link to itself", "listed", r"ant/bad\.png \(cannot be read: Too many levels", looping),
    Case("directories in a circle", "refused", r"up.*: a link to a directory that it lies in", circle),
    Case("link to nothing", "refused", r"images/cow: a link that leads nowhere", dangling),
    Case("name that is not UTF-8", "accepted", r"caf\\xe9\.png", not_utf8),
    Case("control characters in names", "listed", r"'ant/c\\nd\.png' \(", odd_names),
    Case("duplicate across splits", "found", r"no_leak.*ant/2\.png", across_splits),
    Case("duplicate in a split", "warned", r"no_duplicates", twice),
    Case("near-duplicate", "warned", r"few_near_duplicates", nearly_twice),
    Case("class without images", "refused", r"images/cow: class directory without images", no_images),
    Case("class of one image", "refused", r"class cow: 1 decodable images", one_image),
    Case("class of bad images alone", "refused", r"class bee: none of its 6 images can be decoded", all_bad),
    Case("constant image", "found", r"few_constant.*ant/bad", add(encoded(Image.new("L", (8, 8), 3)))),
    Case("image of one colour", "found", r"few_constant.*ant/bad", one_colour),
    Case("image without a label", "refused", r"1 images beside the class directories, stray\.png", stray),
    Case("unbalanced classes", "warned", r"balanced", unbalanced),
    Case("empty folder", "refused", r"raw/empty: no images", empty_folder),
    Case("folder that is not there", "refused", r"raw/imagse: no such file or folder", missing_folder),
]
