"""Images inside the validation page: of offenders, and examples of every class."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.data.validation.charts import FEW
from darkroom.data.validation.findings import Offender

if TYPE_CHECKING:
    import pandas as pd

_OFFENDERS = 12  # thumbnails per finding; of pairs as many
_PER_CLASS, _EXAMPLES = 10, 300  # thumbnails of a class, of all classes
_SIDE = 64  # of a thumbnail on the page, in CSS pixels

STYLE = """
.thumbs { display: flex; flex-wrap: wrap; gap: 8px; margin: .5rem 0 } .thumbs figure { margin: 0 }
.thumbs img { image-rendering: pixelated; border-radius: 3px; display: inline-block; margin-right: 2px }
.thumbs figcaption { font-size: 11px; line-height: 1.3; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap }
.class { display: flex; gap: 4px; align-items: center; margin: 4px 0; flex-wrap: wrap }
.class b { width: 9rem; overflow: hidden; text-overflow: ellipsis; font-weight: 500; white-space: nowrap }
.class img { image-rendering: pixelated; border-radius: 3px }
"""


class Packed:
    """The packed pixels of any row of the manifest."""

    def __init__(self, manifest: pd.DataFrame, splits: dict[str, Split]) -> None:
        self._splits = splits
        self._names = manifest["split"].to_numpy()
        self._rows = {split: np.flatnonzero(self._names == split) for split in splits}

    def pixels(self, row: int) -> NDArray[np.uint8] | None:
        """uint8 (C, H, W); None for an image that was not packed. Its place is its rank in its split."""
        split = self._names[row]
        if split not in self._splits:
            return None
        pixels: NDArray[np.uint8] = self._splits[split].images[np.searchsorted(self._rows[split], row)]
        return pixels


def offender_figures(offenders: Sequence[Offender], packed: Packed) -> str:
    """The first decoded offenders with their names; images that look alike side by side, each pair once."""
    figures: list[str] = []
    shown: set[frozenset[int]] = set()
    for offender in offenders:
        rows = [row for row in (offender.row, offender.partner) if row is not None]
        images = [pixels for row in rows if (pixels := packed.pixels(row)) is not None]
        if not images or frozenset(rows) in shown or len(figures) == _OFFENDERS:
            continue
        shown.add(frozenset(rows))
        caption = f"{offender.name}: {offender.reason}" if offender.reason else offender.name
        width = len(images) * (_SIDE + 2)
        figures.append(
            f'<figure title="{escape(caption)}" style="width: {max(width, 96)}px">{_images(images, offender.name)}'
            f"<figcaption>{escape(offender.name)}<br>{escape(offender.reason)}</figcaption></figure>"
        )
    return f'<div class="thumbs">{"".join(figures)}</div>' if figures else ""


def examples(info: DatasetInfo, train: Split) -> str:
    """Training images of every class; of many classes one or a few each, folded up."""
    if not info.classes:
        return f'<div class="class">{_images(train.images[: 3 * _PER_CLASS], "example")}</div>'
    order = np.argsort(train.labels, kind="stable")
    starts = np.searchsorted(train.labels[order], np.arange(len(info.classes) + 1))
    each = min(max(_EXAMPLES // len(info.classes), 1), _PER_CLASS)
    lines = []
    for label, name in enumerate(info.classes[:_EXAMPLES]):
        first = order[starts[label] : min(starts[label] + each, starts[label + 1])]
        images = _images((train.images[i] for i in first), name)
        lines.append(f'<div class="class"><b title="{escape(name)}">{escape(name)}</b>{images}</div>')
    if len(info.classes) > _EXAMPLES:
        lines.append(f"<p>and {len(info.classes) - _EXAMPLES:,} more classes</p>")
    if len(info.classes) <= FEW:
        return "".join(lines)
    return f"<details><summary>{len(info.classes):,} classes</summary>{''.join(lines)}</details>"


def _images(images: Iterable[NDArray[np.uint8]], alt: str) -> str:
    return "".join(
        f'<img src="{_data_uri(pixels)}" width="{_SIDE}" height="{_SIDE}" alt="{escape(alt)}">' for pixels in images
    )


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """A (C, H, W) image as a PNG inside the page, at most twice the size at which it is shown."""
    from PIL import Image

    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((2 * _SIDE, 2 * _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
