"""A small folder of images, made by rule."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darkroom.params import DataParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 8, 10 and 12 grey 20x16 PNGs, all different, below `animals`."""
    root = tmp_path / "animals"
    generator = np.random.default_rng(0)
    for name, count in (("ant", 8), ("bee", 10), ("cow", 12)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 256, (16, 20), dtype=np.uint8)).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def data_params() -> Callable[..., DataParams]:
    """DataParams for `folder`, with changes."""

    def make(**changes: object) -> DataParams:
        values = {
            "source": "animals",
            "checksum": None,
            "image_size": 8,
            "channels": 1,
            "num_classes": 3,
            "test_fraction": 0.25,
            "seed": 0,
        }
        return DataParams.model_validate(values | changes)

    return make
