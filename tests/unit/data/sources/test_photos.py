"""Crops of scikit-learn's photographs."""

import pickle

import numpy as np
from sklearn.datasets import load_sample_image

from darkroom.data.sources import TEST, TRAIN
from darkroom.data.sources.photos import open_photos


def test_crops_are_the_librarys_pixels_at_the_place_that_the_path_names() -> None:
    source = open_photos()
    for index, pixels in zip(
        (0, 1700, 6071), [next(iter(source.part(i, i + 1))) for i in (0, 1700, 6071)], strict=True
    ):
        name, place = source.paths[index].split("/")
        y, x = map(int, place.split("-"))
        assert name == source.classes[source.labels[index]]
        np.testing.assert_array_equal(pixels, load_sample_image(f"{name}.jpg")[y : y + 64, x : x + 64])


def test_photos_are_sorted_by_class_and_path_and_have_the_counts_that_are_promised() -> None:
    source = open_photos()
    assert source.classes == ["china", "flower"]
    assert source.paths == sorted(set(source.paths))
    assert source.splits is not None
    for label in (0, 1):
        assert np.bincount(source.splits[source.labels == label]).tolist() == [2622, 414]


def test_no_pixel_is_in_train_and_in_test() -> None:
    source = open_photos()
    seen = {split: np.zeros((2, 427, 640), dtype=bool) for split in (TRAIN, TEST)}
    assert source.splits is not None
    for path, label, split in zip(source.paths, source.labels, source.splits, strict=True):
        y, x = map(int, path.split("/")[1].split("-"))
        seen[int(split)][label, y : y + 64, x : x + 64] = True
    assert not (seen[TRAIN] & seen[TEST]).any()
    assert seen[TRAIN].any()
    assert seen[TEST].any()


def test_parts_are_small_pickles_and_together_the_whole() -> None:
    source = open_photos()
    content = pickle.dumps(source.part(100, 110))
    assert len(content) < 2000
    whole = list(source.part(95, 115))
    np.testing.assert_array_equal(list(pickle.loads(content)), whole[5:15])
