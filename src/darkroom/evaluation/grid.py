"""A picture to show to somebody: a row per class, or rows of images without one, enlarged without smoothing."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkroom.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 16
CELL = 48  # pixels of an image's side in the picture, about
GAP = 4
MARGIN = 12
MAX_ROWS = 20
BACKGROUND, INK = (24, 24, 27), (228, 228, 231)


def labelled_grid(images: Tensor, labels: Tensor, classes: list[str], path: Path) -> None:
    """Write a PNG of uint8 `images` (N, C, H, W) in the rows that `grid_rows` gives them, the names before the rows."""
    buffer = io.BytesIO()
    grid_image(images, *grid_rows(labels, classes)).save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def grid_rows(labels: Tensor, classes: list[str]) -> tuple[Tensor, dict[int, str]]:
    """The row of each image, int64 (N,), and the rows' names: one per class of `labels` int64 (N,), in their order.

    Images without classes are in rows of 16 without a name.
    """
    if classes:
        return labels, {label: classes[label] for label in dict.fromkeys(labels.tolist())}
    rows = torch.arange(len(labels)) // COLUMNS
    return rows, dict.fromkeys(rows.tolist(), "")


def grid_image(images: Tensor, labels: Tensor, rows: Mapping[int, str]) -> "Image":
    """The first 16 of uint8 `images` (N, C, H, W) for each of the first 20 labels in `rows`, after the label's name."""
    from PIL import Image, ImageDraw, ImageFont

    side = images.shape[-1] * max(1, round(CELL / images.shape[-1]))
    shown = list(rows.items())[:MAX_ROWS]
    columns = min(COLUMNS, max(int((labels == label).sum()) for label, _ in shown))
    font = ImageFont.load_default(size=max(12, side // 3))
    gutter = max(round(font.getlength(name)) for _, name in shown) + 2 * MARGIN
    width = gutter + columns * (side + GAP) - GAP + MARGIN
    height = 2 * MARGIN + len(shown) * (side + GAP) - GAP
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for row, (label, name) in enumerate(shown):
        top = MARGIN + row * (side + GAP)
        pen.text((gutter - MARGIN, top + side / 2), name, fill=INK, font=font, anchor="rm")
        for column, image in enumerate(images[labels == label][:columns]):
            canvas.paste(to_image(image, side), (gutter + column * (side + GAP), top))
    return canvas


def to_image(image: Tensor, side: int | None = None) -> "Image":
    """uint8 (C, H, W) as a grey, RGB or RGBA image; as RGB and enlarged without smoothing if a `side` is given."""
    from PIL import Image

    pixels = image.movedim(0, -1).numpy()
    tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return tile if side is None else tile.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
