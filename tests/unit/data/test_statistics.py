"""The statistics of a data set: exact, and read back as they were written."""

import json
from pathlib import Path

import numpy as np
import pytest

from darkroom.data.statistics import STATISTICS_FILE, DataStatistics, read_statistics, write_statistics
from darkroom.errors import InputError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)


def of(pixels: np.ndarray, **changes: object) -> DataStatistics:
    values = {
        "name": "pets",
        "digest": "d" * 64,
        "image_size": 8,
        "channels": 3,
        "classes": {"dog": 3, "çat": 4},
        "images": 7,
        "sums": pixels.sum(axis=(0, 2, 3), dtype=np.int64).tolist(),
        "squares": (pixels.astype(np.int64) ** 2).sum(axis=(0, 2, 3)).tolist(),
    }
    return DataStatistics.model_validate(values | changes)


def test_moments_are_those_of_the_pixels(pixels: np.ndarray) -> None:
    mean, std = of(pixels).channel_moments()
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-13)


def test_moments_of_a_million_images_do_not_overflow() -> None:
    half = 1_281_167 * 1024 * 512
    total, squares = half * (254 + 255), half * (254**2 + 255**2)
    huge = DataStatistics(
        name="x", digest="", image_size=1024, channels=1, classes={}, images=1_281_167, sums=[total], squares=[squares]
    )
    mean, std = huge.channel_moments()
    assert mean.tolist() == [254.5]
    assert std.tolist() == [0.5]


def test_class_shares_are_fractions_of_all_images(pixels: np.ndarray) -> None:
    assert of(pixels).class_shares() == {"dog": 3 / 7, "çat": 4 / 7}
    assert of(pixels, classes={}).class_shares() == {}


def test_file_gives_back_what_was_written_sorted(pixels: np.ndarray, tmp_path: Path) -> None:
    statistics = of(pixels)
    write_statistics(tmp_path / STATISTICS_FILE, statistics)
    assert read_statistics(tmp_path) == statistics
    text = (tmp_path / STATISTICS_FILE).read_text(encoding="utf-8")
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sums": [0, 0, 0]}, "are not those of pixels from 0 to 255"),
        ({"images": 1, "classes": {}}, "are not those of pixels from 0 to 255"),
        ({"squares": [0, 0]}, "expected sums and squares of 3 channels"),
        ({"classes": {"dog": 3}}, "the images of the classes are not all images"),
        ({"images": "many"}, "images: "),
        ({"more": 1}, "more: "),
    ],
)
def test_garbled_file_is_refused_with_the_reason(
    pixels: np.ndarray, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = tmp_path / STATISTICS_FILE
    path.write_text(json.dumps(of(pixels).model_dump() | change))
    with pytest.raises(InputError, match="run the prepare stage again") as error:
        read_statistics(tmp_path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_missing_and_cut_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; the prepare stage writes it"):
        read_statistics(tmp_path)
    (tmp_path / STATISTICS_FILE).write_text('{"name": ')
    with pytest.raises(InputError, match="cannot be read"):
        read_statistics(tmp_path)
