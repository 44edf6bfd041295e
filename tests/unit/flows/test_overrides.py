"""Values of params.yaml are replaced where they stand."""

import pytest
import yaml

from flows.overrides import replaced


@pytest.mark.parametrize(
    "before",
    ["train:\n  mirror:\n  steps: 1\n", "train:\n  mirror: # nowhere\n  steps: 1\n", "train: {mirror: , steps: 1}\n"],
)
def test_a_value_that_was_left_out_can_be_given(before: str) -> None:
    after = replaced(before, ["train", "mirror"], "s3://bucket/mirror")
    assert yaml.safe_load(after) == {"train": {"mirror": "s3://bucket/mirror", "steps": 1}}
    assert after.count("#") == before.count("#")
