"""A picture to show to somebody: a row per class, enlarged without smoothing."""

import io
from pathlib import Path

from torch import Tensor

from darkroom.files import write_bytes

COLUMNS = 16
CELL = 48  # pixels of an image's side in the picture, about
GAP = 4
MARGIN = 12
MAX_ROWS = 20
BACKGROUND, INK = (24, 24, 27), (228, 228, 231)


def labelled_grid(images: Tensor, labels: Tensor, classes: list[str], path: Path) -> None:
    """Write a PNG with the first images of each class of uint8 `images` (N, C, H, W), the class name before its row."""
    from PIL import Image, ImageDraw, ImageFont

    factor = max(1, round(CELL / images.shape[-1]))
    side = images.shape[-1] * factor
    names = classes[:MAX_ROWS]
    font = ImageFont.load_default(size=max(12, side // 3))
    gutter = max(round(font.getlength(name)) for name in names) + 2 * MARGIN
    width = gutter + COLUMNS * (side + GAP) - GAP + MARGIN
    height = 2 * MARGIN + len(names) * (side + GAP) - GAP
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for row, name in enumerate(names):
        top = MARGIN + row * (side + GAP)
        pen.text((gutter - MARGIN, top + side / 2), name, fill=INK, font=font, anchor="rm")
        for column, image in enumerate(images[labels == row][:COLUMNS]):
            pixels = image.movedim(0, -1).numpy()
            tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
            enlarged = tile.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (gutter + column * (side + GAP), top))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())
