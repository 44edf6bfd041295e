"""Where images come from. A source lists them, sorted, and reads one at a time."""

from pathlib import Path
from typing import Protocol

from darkroom.data.images import Picture
from darkroom.errors import InputError
from darkroom.params import DataParams


class Source(Protocol):
    """A sorted list of labelled images."""

    name: str
    classes: list[str]  # names; a label is a position in this list
    paths: list[str]  # one per image, unique, relative to the source
    labels: list[int]  # one per image

    def read(self, index: int) -> Picture:
        """Image `index`, decoded to the declared size and channels. Safe to call from several threads."""


def open_source(params: DataParams, root: Path, raw: Path) -> Source:
    """The source that `data.source` names; a relative folder is relative to `root`, S3 objects are fetched into `raw`.

    Raises InputError for a source that is missing, empty, unreachable, or has another number of classes than declared.
    """
    source = _open(params, root, raw)
    if len(source.classes) != params.num_classes:
        declared = f"params.yaml: data.num_classes = {params.num_classes}"
        raise InputError(f"{declared}: source {params.source} has {len(source.classes)} classes")
    return source


def _open(params: DataParams, root: Path, raw: Path) -> Source:
    if params.source == "digits":
        from darkroom.data.sources.digits import Digits

        return Digits(params.image_size, params.channels)
    from darkroom.data.sources.folder import Folder

    if params.source.startswith("s3://"):
        from darkroom.data.s3 import fetch

        directory = fetch(params.source, raw)
        return Folder(directory, params.image_size, params.channels, name=params.source.rstrip("/").rpartition("/")[2])
    if "://" in params.source:
        scheme = params.source.partition("://")[0]
        raise InputError(
            f"params.yaml: data.source = {params.source!r}: unknown scheme {scheme}://; "
            "expected digits, a folder with a directory per class, or s3://bucket/prefix"
        )
    return Folder(root / params.source, params.image_size, params.channels)
