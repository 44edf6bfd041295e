"""The digits are scikit-learn's."""

import numpy as np
from sklearn.datasets import load_digits

from darkroom.data.sources.digits import open_digits


def test_digits_are_the_librarys_1797_scans() -> None:
    source, bunch = open_digits(), load_digits()
    assert len(source.paths) == len(set(source.paths)) == 1797
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (np.diff(source.labels) >= 0).all()
    for index in (0, 500, 1796):
        scan = int(source.paths[index].rpartition("/")[2])
        assert source.labels[index] == bunch.target[scan]
        (pixels,) = source.part(index, index + 1)
        # A level of 0..16 is found again from 0..255 without loss.
        np.testing.assert_array_equal(np.round(pixels * (16 / 255)), bunch.images[scan])
        assert np.abs(pixels - bunch.images[scan] * 255 / 16).max() <= 0.5
