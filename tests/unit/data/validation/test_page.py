"""The validation page: self-contained, escaped, complete, with the right pictures."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.data.statistics import DataStatistics
from darkroom.data.validation.drift import Drift, measure
from darkroom.data.validation.findings import Finding, Offender
from darkroom.data.validation.page import render

HOSTILE = "<script>alert('&')</script>\"x"
SPLITS = ["train", "none", "test", "train", "train", "test", "train", "train"]  # of the manifest's rows


class Tags(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.names: list[str] = []
        self.text = ""
        self.sources: list[str] = []
        self.figures: list[list[str]] = []  # the images of each figure
        self.inside = False  # a figure
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        sources = [value or "" for name, value in attrs if name in ("src", "href")]
        self.sources += sources
        if tag == "figure":
            self.figures.append([])
            self.inside = True
        elif self.inside:
            self.figures[-1] += sources

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self.inside = False

    def handle_data(self, data: str) -> None:
        self.text += data


def pixels(source: str) -> np.ndarray:
    """The (C, H, W) image inside a data URI."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def split_of(count: int, channels: int, labels: list[int], seed: int) -> Split:
    images = np.random.default_rng(seed).integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)
    return Split(images, np.array(labels))


def make(
    channels: int = 3,
    classes: list[str] | None = None,
    findings: list[Finding] | None = None,
    drift: Drift | None = None,
    splits: dict[str, Split] | None = None,
) -> Tags:
    classes = [HOSTILE, "dog"] if classes is None else classes
    info = DatasetInfo(
        name=HOSTILE,
        image_size=8,
        channels=channels,
        classes=classes,
        splits={"train": 5, "test": 2},
        digest="d" * 64,
    )
    manifest = pd.DataFrame(
        {
            "split": SPLITS,
            "format": [HOSTILE, "", *["PNG"] * 6],
            "mode": ["L", "", *[HOSTILE] * 6],
            "width": [8, None, *range(8, 14)],
            "height": [8, None, *[9] * 6],
            "bytes": [1, 0, *[10] * 6],
        }
    )
    figures: dict[str, Any] = {
        "undecodable": 1,
        "per_class": {name: {"train": 3 - i % 2, "test": 1} for i, name in enumerate(classes)},
    }
    splits = splits or {"train": split_of(5, channels, [0, 0, 0, 1, 1], 0), "test": split_of(2, channels, [0, 1], 1)}
    return Tags(render(info, manifest, findings or [], figures, splits, drift))


def failing(offenders: list[Offender], count: int | None = None, **changes: Any) -> Finding:
    values = {"name": "decodable", "severity": "critical", "expected": HOSTILE, "success": False, "observed": HOSTILE}
    return Finding(**values | changes, count=count or len(offenders), offenders=tuple(offenders))


def drifted(classes: dict[str, int], size: int = 8) -> DataStatistics:
    images = sum(classes.values())
    white = images * size**2
    return DataStatistics(
        name=HOSTILE,
        digest=f"{images:064x}",
        image_size=size,
        channels=1,
        classes=classes,
        images=images,
        sums=[white * 255],
        squares=[white * 255**2],
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_what_comes_from_the_data_is_text_not_markup(channels: int) -> None:
    offenders = [Offender(HOSTILE, HOSTILE, 1), Offender(HOSTILE, HOSTILE, 0), Offender(HOSTILE, HOSTILE)]
    drift = measure(drifted({HOSTILE: 3, "b": 1}), drifted({"b": 2}))
    page = make(channels, findings=[failing(offenders, severity=HOSTILE, name=HOSTILE)], drift=drift)
    assert "script" not in page.names
    assert "<script" not in page.html
    assert page.text.count(HOSTILE) >= 15


def test_page_loads_nothing() -> None:
    page = make(findings=[failing([Offender("a", "b", 0)])])
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"(?:url\(|@import|https?://)", page.html)


@pytest.mark.parametrize("channels", [1, 3])
def test_offenders_show_their_packed_pixels(channels: int) -> None:
    splits = {"train": split_of(5, channels, [0, 0, 0, 1, 1], 0), "test": split_of(2, channels, [0, 1], 1)}
    page = make(channels, findings=[failing([Offender(str(row), "", row) for row in range(8)])], splits=splits)
    ranks = {0: ("train", 0), 2: ("test", 0), 3: ("train", 1), 4: ("train", 2), 5: ("test", 1)}
    ranks |= {6: ("train", 3), 7: ("train", 4)}  # row 1 was not decoded
    assert len(page.figures) == 7
    for figure, (split, rank) in zip(page.figures, ranks.values(), strict=True):
        assert [pixels(source).tolist() for source in figure] == [splits[split].images[rank].tolist()]


def test_images_that_look_alike_stand_side_by_side_once() -> None:
    offenders = [Offender("a", "looks like b", 0, 2), Offender("b", "looks like a", 2, 0), Offender("c", "", 3, 0)]
    page = make(findings=[failing(offenders, severity="warning")])
    assert [len(figure) for figure in page.figures] == [2, 2]


def test_at_most_twelve_offenders_have_a_picture_and_the_count_is_of_all() -> None:
    page = make(findings=[failing([Offender(str(i), "", i % 8, i // 8) for i in range(20)], count=12345)])
    assert len(page.figures) == 12
    assert "decodable: 12,345 (critical)" in page.text
    assert "and 12,325 more" in page.text


def test_undecodable_offenders_are_an_open_list() -> None:
    page = make(findings=[failing([Offender("cat.png", "truncated", 1)])])
    assert page.figures == []
    assert re.search(r"<details open><summary>1 by name</summary><ul><li><code>cat.png</code>: truncated", page.html)


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], "good"),
        ([failing([])], "refused: 1 critical"),
        ([failing([]), failing([], severity="warning"), failing([], success=True)], "refused: 1 critical, 1 warning"),
        ([failing([], severity="warning")] * 2, "good, 2 warnings"),
    ],
)
def test_title_is_the_verdict(findings: list[Finding], verdict: str) -> None:
    assert f"{HOSTILE}: {verdict}\n" in make(findings=findings).text


def test_every_class_has_its_bar_and_its_examples() -> None:
    page = make()
    assert page.names.count("img") == 5
    assert page.names.count("rect") == 4
    assert "3 + 1" in page.text
    assert "2 + 1" in page.text


def test_a_thousand_classes_are_folded_up() -> None:
    classes = [f"n{i:04d}" for i in range(1000)]
    labels = [label for label in range(1000) for _ in range(2)]
    splits = {"train": split_of(2000, 1, labels, 0), "test": split_of(2, 1, [0, 1], 1)}
    page = make(1, classes=classes, splits=splits)
    assert page.names.count("rect") == 2000
    assert page.names.count("polygon") == 1
    assert page.names.count("img") == 300
    assert page.names.count("details") == 2
    assert "<details open" not in page.html
    assert "largest 4 (n0000); median 3 (n0001); smallest 3 (n0999)" in page.text
    assert len(page.html) < 1_000_000


def test_unlabelled_data_is_a_number_and_some_images() -> None:
    splits = {"train": split_of(5, 3, [0] * 5, 0), "test": split_of(2, 3, [0] * 2, 1)}
    page = make(classes=[], splits=splits)
    assert "7 images without labels: 5 train, 2 test" in page.text
    assert page.names.count("img") == 5


def one(classes: dict[str, int], **changes: Any) -> Drift:
    return measure(drifted(classes, **changes), drifted({"ant": 3, "bee": 1}))


@pytest.mark.parametrize(
    ("drift", "words"),
    [
        (lambda: None, ["no accepted data set"]),
        (lambda: one({"ant": 3, "bee": 1}), ["This is the accepted data set"]),
        (lambda: one({"ant": 1, "cow": 1}), ["cow50.00%0.00%-50.00%", "ant50.00%75.00%+25.00%", "255.00 ± 0.00"]),
        (lambda: one({"ant": 9}, size=4), ["Not comparable: the accepted images are 1x4x4", "bee0.00%25.00%"]),
        (lambda: one({f"c{i}": 1 for i in range(20)}), ["and 12 classes that changed less"]),
    ],
)
def test_drift_is_told_or_why_there_is_none(drift: Callable[[], Drift | None], words: list[str]) -> None:
    text = make(drift=drift()).text
    for word in words:
        assert word in text


def test_source_files_are_counted_by_form() -> None:
    assert f"PNG{HOSTILE}8–13 × 9106" in make().text
    assert "unknownunknown? × ?01" in make().text
