"""Where images come from: one module per form, each with a function that lists a source without decoding anything.

A source is listed once, in the process that prepares; its images are read in parts, by others. So a part is a small
picklable iterable, and a listing stays a few hundred bytes per image.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darkroom.errors import InputError
from darkroom.params import DataParams

if TYPE_CHECKING:
    from darkroom.data.images import Content

TRAIN, TEST = 0, 1  # in `Source.splits`


@dataclass(frozen=True)
class Source:
    """A list of images, in an order of their names alone: by class, then by path. Parquet keeps that of its rows."""

    name: str  # of the data set: "digits", or the last part of the source's path
    form: str  # what was found, in words: "CIFAR-10 archive"
    classes: list[str]  # names; a label is a position in this list; empty: unlabelled
    paths: list[str]  # one per image, relative to the source; text without undecodable bytes
    labels: NDArray[np.int32]  # one per image; all 0 when unlabelled
    splits: NDArray[np.uint8] | None  # TRAIN or TEST per image where the source itself says so
    identity: str  # digest of all that the listing knows (names, sizes, times, versions): new when an image may be
    part: Callable[[int, int], Iterable["Content"]]  # the contents of images start to stop - 1, in order; picklable


def open_source(params: DataParams, root: Path, raw: Path, scratch: Path) -> Source:
    """The source that `data.source` names. A relative path is relative to `root`, S3 objects are fetched into `raw`,
    and what has to be unpacked before it can be read goes to `scratch`.

    Raises InputError for a source that is missing, empty, unreachable, of no known form, damaged, or not as declared.
    """
    source = _open(params, root, raw, scratch)
    if len(set(source.classes)) < len(source.classes):
        repeated = next(name for name in source.classes if source.classes.count(name) > 1)
        raise InputError(f"source {params.source}: {repeated!r} is the name of several classes; rename one")
    if len(source.classes) != params.num_classes:
        declared = f"params.yaml: data.num_classes = {params.num_classes}"
        found = f"has {len(source.classes)} classes" if source.classes else "is unlabelled: expected 0"
        raise InputError(f"{declared}: source {params.source} {found}")
    if params.test_fraction is None:
        if source.splits is None:
            raise InputError(
                f"params.yaml: data.test_fraction = null: source {params.source} ({source.form}) has no split of its "
                "own; expected the fraction of each class to hold out"
            )
        for split, name in ((TRAIN, "train"), (TEST, "test")):
            if not (source.splits == split).any():
                raise InputError(f"params.yaml: data.test_fraction = null: source {params.source} has no {name} images")
    return source


def _open(params: DataParams, root: Path, raw: Path, scratch: Path) -> Source:
    if params.source == "digits":
        from darkroom.data.sources.digits import open_digits

        return open_digits()
    if params.source == "photos":
        from darkroom.data.sources.photos import open_photos

        return open_photos()
    from darkroom.data.sources.forms import open_path

    if params.source.startswith("s3://"):
        from darkroom.data.s3.fetching import fetch

        path = fetch(params.source, raw)
        return open_path(path, params.checksum, scratch, name=params.source.rstrip("/").rpartition("/")[2])
    if "://" in params.source:
        scheme = params.source.partition("://")[0]
        raise InputError(
            f"params.yaml: data.source = {params.source!r}: unknown scheme {scheme}://; "
            "expected digits, photos, a file, a folder, or s3://bucket/prefix"
        )
    return open_path(root / params.source, params.checksum, scratch)
