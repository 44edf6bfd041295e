"""The lines to copy ask for something that the champion has."""

import json

import pytest

from flows.champion import _two_images


@pytest.mark.parametrize(
    ("num_classes", "labels"), [(1000, [3, 7]), (8, [3, 7]), (5, [3, 4]), (2, [1, 1]), (1, [0, 0])]
)
def test_the_example_asks_for_classes_that_there_are(num_classes, labels):
    rows, body = _two_images(num_classes)
    assert json.loads(rows) == {"class_label": labels}
    assert json.loads(body) == {"columns": ["class_label"], "data": [[label] for label in labels]}


def test_the_example_for_images_without_classes_asks_for_rows_without_columns():
    rows, body = _two_images(0)
    assert rows == "index=range(2)"
    assert json.loads(body) == {"columns": [], "data": [[], []]}
