"""Values of params.yaml are replaced where they stand."""

from pathlib import Path

import pytest
import yaml

from darkroom.errors import InputError
from flows.overrides import override, replaced


@pytest.mark.parametrize(
    "before",
    ["train:\n  mirror:\n  steps: 1\n", "train:\n  mirror: # nowhere\n  steps: 1\n", "train: {mirror: , steps: 1}\n"],
)
def test_a_value_that_was_left_out_can_be_given(before: str) -> None:
    after = replaced(before, ["train", "mirror"], "s3://bucket/mirror")
    assert yaml.safe_load(after) == {"train": {"mirror": "s3://bucket/mirror", "steps": 1}}
    assert after.count("#") == before.count("#")


def test_a_file_that_means_harm_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: " + "[" * 20_000 + "]" * 20_000)
    with pytest.raises(InputError, match=r"^params.yaml: cannot be read: more than 32 levels deep.*$"):
        override(tmp_path, {"train.steps": 1})
