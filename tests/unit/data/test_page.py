"""The validation page: self-contained, escaped, complete."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.data.page import render
from darkroom.data.validation import Finding, Offender

HOSTILE = "<script>alert('&')</script>\"x"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(params=[1, 3])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Tags:
    channels = request.param
    info = DatasetInfo(
        name=HOSTILE,
        image_size=8,
        channels=channels,
        classes=[HOSTILE, "dog"],
        splits={"train": 5, "test": 2},
        digest="d" * 64,
    )
    manifest = pd.DataFrame(
        {"format": [HOSTILE, "PNG"], "mode": ["L", HOSTILE], "width": [8, None], "height": [8, None], "bytes": [1, 2]}
    )
    offenders = [Offender(f"{HOSTILE}{i}", HOSTILE, i) for i in range(25)]
    findings = [
        Finding("decodable", "critical", HOSTILE, False, HOSTILE, offenders),
        Finding("balanced", "warning", "equal classes", False, "0.1", []),
        Finding("fine", "critical", "nothing", True, "0", []),
    ]
    statistics = {"undecodable": 25, "per_class": {HOSTILE: {"train": 3, "test": 1}, "dog": {"train": 2, "test": 1}}}
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 8, 8), dtype=np.uint8)
    html = render(info, manifest, findings, statistics, Split(images, np.array([0, 0, 0, 1, 1])))
    tags = Tags()
    tags.feed(html)
    assert not re.search(r"(?:url\(|@import|https?://)", html)
    return tags


def test_what_comes_from_the_data_is_text_not_markup(page: Tags) -> None:
    assert "script" not in page.names
    assert page.text.count(HOSTILE) >= 20 * 2 + 5


def test_page_loads_nothing_and_shows_every_class(page: Tags) -> None:
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.names.count("img") == 5
    assert page.names.count("rect") == 4
    assert "3 + 1" in page.text
    assert "2 + 1" in page.text


def test_verdict_and_offenders_are_there(page: Tags) -> None:
    assert "refused: 1 critical" in page.text
    assert "1 warning" in page.text
    assert "and 5 more" in page.text
