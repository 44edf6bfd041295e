"""What the expectations need and no single row of the manifest knows, as columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darkroom.data.dataset import SPLITS, DatasetInfo
from darkroom.data.manifest import COLUMNS
from darkroom.data.validation.duplicates import near_duplicates
from darkroom.params import ValidateParams

if TYPE_CHECKING:
    import pandas as pd

# Null in a row that could not be decoded, and only there.
_OF_DECODED = ("width", "height", "packed", "mean", "std")


def images_frame(manifest: pd.DataFrame, params: ValidateParams) -> pd.DataFrame:
    """The manifest with a column per rule about one image; the index is the position in the manifest.

    image: a number for each sha256, in the order of appearance, -1 for none; undecodable, incomplete (a value is
    missing), mode_unknown, in_both_splits, duplicate (of another in its split), near_duplicate: flags; partner: row of
    the nearest near-duplicate, or -1; source_side: shorter side of the source image in pixels.
    """
    import pandas as pd

    frame = manifest.reset_index(drop=True)
    decoded = frame["decoded"].fillna(False).to_numpy(dtype=bool)
    constant = frame["constant"].fillna(False).to_numpy(dtype=bool)
    images = pd.factorize(frame["sha256"])[0].astype(np.int64)
    splits = _positions(frame["split"], SPLITS)
    in_both, duplicate = _copies(np.where(decoded, images, -1), splits)
    hashes = frame["phash"].fillna(0).to_numpy(dtype=np.uint64)
    partner = near_duplicates(hashes, images, decoded & ~constant, params.near_duplicate_bits)
    missing = np.zeros(len(frame), dtype=bool)
    for name in COLUMNS:
        null = frame[name].isna().to_numpy()
        missing |= null & decoded if name in _OF_DECODED else null
    known_mode = frame["mode"].isin(params.modes).to_numpy() if params.modes else np.ones(len(frame), dtype=bool)
    return frame.assign(
        image=images,
        constant=constant,
        undecodable=~decoded,
        incomplete=missing,
        mode_unknown=decoded & ~known_mode,
        in_both_splits=in_both,
        duplicate=duplicate,
        near_duplicate=partner >= 0,
        partner=partner,
        source_side=np.fmin(*(frame[side].to_numpy(dtype=np.float64, na_value=np.nan) for side in ("width", "height"))),
    )


def _positions(column: pd.Series[str], names: tuple[str, ...]) -> NDArray[np.int64]:
    """The position in `names` of every value, or -1."""
    return np.select([(column == name).fillna(False).to_numpy(dtype=bool) for name in names], range(len(names)), -1)


def _copies(images: NDArray[np.int64], splits: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two flags per row: its image is in every split; its image is more than once in its split."""
    rows = np.flatnonzero((images >= 0) & (splits >= 0))
    keys = images[rows] * len(SPLITS) + splits[rows]
    counts = np.bincount(keys, minlength=(int(images.max(initial=0)) + 1) * len(SPLITS))
    in_both, duplicate = (np.zeros(len(images), dtype=bool) for _ in range(2))
    everywhere = counts.reshape(-1, len(SPLITS)).min(axis=1) > 0
    in_both[rows] = everywhere[images[rows]]
    duplicate[rows] = counts[keys] > 1
    return in_both, duplicate


def classes_frame(frame: pd.DataFrame, info: DatasetInfo) -> pd.DataFrame:
    """A row per class of `dataset.json`; a single one, without a name, for unlabelled data.

    images: how many were decoded; imbalance: that over the average class's, or the inverse if that is larger.
    """
    import pandas as pd

    names = info.classes or [""]
    counts = frame.loc[~frame["undecodable"], "class_name"].value_counts()
    images = counts.reindex(names, fill_value=0).to_numpy(dtype=np.int64)
    share = np.maximum(images, 0.5) * len(names) / max(int(images.sum()), 1)  # half an image: an empty class is finite
    return pd.DataFrame({"class_name": names, "images": images, "imbalance": np.maximum(share, 1 / share)})
