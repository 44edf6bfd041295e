"""The suite: every expectation holds on good data and can fail, and the message names the rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from darkroom.data.dataset import DatasetInfo
from darkroom.data.manifest import Row, read_manifest, write_manifest
from darkroom.data.validation import CRITICAL, Finding, check, failure_message
from darkroom.errors import InputError
from darkroom.params import ValidateParams

SUITE = Path(__file__).parents[3] / "expectations" / "images.json"
INFO = DatasetInfo(
    name="pets", image_size=8, channels=3, classes=["cat", "dog"], splits={"train": 16, "test": 4}, digest="d" * 64
)
PARAMS = ValidateParams(min_images_per_class=5, max_constant_share=0.05, max_undecodable=1)


def row(i: int) -> Row:
    name = INFO.classes[i % 2]
    return Row(
        path=f"{name}/{i:02d}.png",
        split="test" if i < 4 else "train",
        label=i % 2,
        class_name=name,
        format="PNG",
        mode="RGB",
        width=32,
        height=24,
        bytes=1000 + i,
        packed="3x8x8",
        mean=100.0,
        std=10.0,
        sha256=f"{i:064x}",
        constant=False,
        decoded=True,
        error="",
    )


def spoil(frame: pd.DataFrame, rows: list[int], reason: str = "truncated") -> None:
    frame.loc[rows, "decoded"] = False
    frame.loc[rows, "split"] = "none"
    frame.loc[rows, "error"] = reason
    frame.loc[rows, ["width", "height", "packed", "mean", "std"]] = None


@pytest.fixture
def manifest(tmp_path: Path) -> pd.DataFrame:
    """Twenty good images in two classes, as read from a file."""
    write_manifest(tmp_path / "manifest.parquet", [row(i) for i in range(20)])
    return read_manifest(tmp_path / "manifest.parquet")


def failed(frame: pd.DataFrame) -> dict[str, Finding]:
    return {finding.name: finding for finding in check(frame, INFO, PARAMS, SUITE) if not finding.success}


def names(finding: Finding) -> list[str]:
    return [offender.name for offender in finding.offenders]


def test_good_manifest_passes_every_expectation(manifest: pd.DataFrame) -> None:
    findings = check(manifest, INFO, PARAMS, SUITE)
    assert [finding.name for finding in findings if not finding.success] == []
    assert len(findings) == len(json.loads(SUITE.read_text())["expectations"])


def test_undecodable_images_up_to_the_limit_disturb_no_other_expectation(manifest: pd.DataFrame) -> None:
    spoil(manifest, [7])
    assert failed(manifest) == {}


def set_cells(column: str, value: Any, rows: list[int]) -> Callable[[pd.DataFrame], None]:
    def change(frame: pd.DataFrame) -> None:
        if column == "label":
            frame["label"] = frame["label"].astype("float64")
        frame.loc[rows, column] = value

    return change


def one_class_small(frame: pd.DataFrame) -> None:
    spoil(frame, [1, 3, 5, 7, 9, 11])  # 4 of the dogs are left; 5 are wanted


def unbalanced(frame: pd.DataFrame) -> None:
    spoil(frame, [i for i in range(20) if i % 2 and i > 5])


CAT, DOG = "cat/06.png", "dog/05.png"

# expectation -> (what to do to a good manifest, the offenders that must be named)
VIOLATIONS: dict[str, tuple[Callable[[pd.DataFrame], None], list[str]]] = {
    "decodable": (lambda frame: spoil(frame, [5, 6]), [DOG, CAT]),
    "paths_unique": (set_cells("path", CAT, [8]), [CAT, CAT]),
    "path_present": (set_cells("path", None, [5]), ["missing"]),
    "label_present": (set_cells("label", None, [5]), [DOG]),
    "class_present": (set_cells("class_name", None, [5]), [DOG]),
    "split_present": (set_cells("split", None, [5]), [DOG]),
    "digest_present": (set_cells("sha256", None, [5]), [DOG]),
    "labels_known": (set_cells("label", 2, [6]), [CAT]),
    "classes_known": (set_cells("class_name", "cow", [6]), [CAT]),
    "labels_all_present": (set_cells("label", 0, list(range(20))), []),
    "splits_known": (set_cells("split", "validation", [5]), [DOG]),
    "size_as_declared": (set_cells("packed", "1x8x8", [5]), [DOG]),
    "no_leak": (set_cells("sha256", f"{0:064x}", [6]), ["cat/00.png", CAT]),
    "enough_per_class": (one_class_small, ["class dog"]),
    "few_constant": (set_cells("constant", True, [5, 6]), [DOG, CAT]),
    "no_duplicates": (set_cells("sha256", f"{5:064x}", [6]), [DOG, CAT]),
    "balanced": (unbalanced, ["class dog"]),
    "not_enlarged": (set_cells("height", 7, [5]), [DOG]),
}


def test_every_expectation_of_the_suite_has_its_violation() -> None:
    entries = json.loads(SUITE.read_text())["expectations"]
    assert [entry["meta"]["name"] for entry in entries] == list(VIOLATIONS)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violated_expectation_fails_and_names_the_offenders(manifest: pd.DataFrame, name: str) -> None:
    change, offenders = VIOLATIONS[name]
    change(manifest)
    assert names(failed(manifest)[name]) == offenders


@pytest.mark.parametrize("column", ["packed", "split", "sha256", "label", "constant", "error"])
def test_missing_column_is_never_a_pass(manifest: pd.DataFrame, column: str) -> None:
    with pytest.raises(InputError, match=rf"manifest has no column {column}"):
        check(manifest.drop(columns=[column]), INFO, PARAMS, SUITE)


def test_message_has_the_expectation_the_rows_their_reasons_and_how_many_more(manifest: pd.DataFrame) -> None:
    spoil(manifest, list(range(4, 12)))
    manifest.loc[4, "error"] = "image file is truncated\x1b[2J"
    lines = failure_message("pets", check(manifest, INFO, PARAMS, SUITE)).splitlines()
    assert lines == [
        'dataset pets: expectation "decodable" failed: expected at most 1 images that cannot be decoded, found 8: '
        r"cat/04.png ('image file is truncated\x1b[2J'); dog/05.png (truncated); cat/06.png (truncated); "
        "dog/07.png (truncated); cat/08.png (truncated); and 3 more"
    ]


def test_warning_does_not_stop(manifest: pd.DataFrame) -> None:
    set_cells("sha256", f"{8:064x}", [6])(manifest)
    findings = check(manifest, INFO, PARAMS, SUITE)
    assert [finding.name for finding in findings if not finding.success] == ["no_duplicates"]
    assert failure_message("pets", findings) == ""


def test_suite_that_could_not_stop_anything_is_refused(manifest: pd.DataFrame, tmp_path: Path) -> None:
    def refused(change: Callable[[list[dict[str, object]]], object]) -> str:
        entries = json.loads(SUITE.read_text())["expectations"]
        change(entries)
        path = tmp_path / "suite.json"
        path.write_text(json.dumps({"name": "images", "expectations": entries}))
        with pytest.raises(InputError) as error:
            check(manifest, INFO, PARAMS, path)
        return str(error.value)

    assert "no critical expectation" in refused(lambda entries: entries.clear())
    assert "severity 'fatal'; expected critical or warning" in refused(
        lambda entries: entries[0].update(severity="fatal")
    )
    assert "meta.name appears twice: decodable" in refused(lambda entries: entries.append(entries[0]))
    assert "meta" in refused(lambda entries: entries[0].pop("meta"))
    assert refused(lambda entries: entries[0].update(type="expect_wonders")).endswith("expect_wonders not found")
    assert "suite.json: decodable: " in refused(lambda entries: entries[0].update(kwargs={"colum": "undecodable"}))
    assert "suite.json: decodable: " in refused(lambda entries: entries[0].update(kwargs={"column": "row", "max": 0}))
    boundless = refused(lambda entries: entries[0].update(kwargs={"column": "undecodable"}))
    assert boundless.endswith("suite.json: decodable: expected min_value or max_value in kwargs")
    misspelt = {"column": "undecodable", "max_value": {"$PARAMETER": "max_undecodeable"}}
    assert "max_undecodeable" in refused(lambda entries: entries[0].update(kwargs=misspelt))
    with pytest.raises(InputError, match="no such file"):
        check(manifest, INFO, PARAMS, tmp_path / "none.json")


def test_findings_are_deterministic_json(manifest: pd.DataFrame) -> None:
    spoil(manifest, [5, 6])
    first, second = (
        json.dumps([finding.to_json_dict() for finding in check(manifest, INFO, PARAMS, SUITE)]) for _ in range(2)
    )
    assert first == second
    assert json.loads(first)[0]["severity"] == CRITICAL
