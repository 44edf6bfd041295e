"""The suite: every expectation holds on good data and can fail, and the message names the rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from darkroom.data.dataset import DatasetInfo
from darkroom.data.manifest import read_manifest, write_manifest
from darkroom.data.statistics import DataStatistics
from darkroom.data.validation.drift import measure
from darkroom.data.validation.findings import CRITICAL, SHOWN, Finding, failure_message
from darkroom.data.validation.suite import check
from darkroom.errors import InputError
from darkroom.params import ValidateParams

SUITE = Path(__file__).parents[4] / "expectations" / "images.json"
INFO = DatasetInfo(
    name="pets", image_size=8, channels=3, classes=["cat", "dog"], splits={"train": 16, "test": 4}, digest="d" * 64
)
PARAMS = ValidateParams(
    min_images_per_class=5,
    max_constant_share=0.05,
    max_undecodable=1,
    max_in_both_splits=0,
    modes=["RGB", "L"],
    near_duplicate_bits=2,
    max_near_duplicate_share=0.05,
    max_imbalance=2.0,
    max_class_drift=0.1,
    max_channel_drift=0.1,
)


def row(i: int) -> dict[str, Any]:
    name = INFO.classes[i % 2]
    return {
        "path": f"{name}/{i:02d}.png",
        "split": "test" if i < 4 else "train",
        "label": i % 2,
        "class_name": name,
        "format": "PNG",
        "mode": "RGB",
        "width": 32,
        "height": 24,
        "bytes": 1000 + i,
        "packed": "3x8x8",
        "mean": 100.0,
        "std": 10.0,
        "sha256": f"{i:064x}",
        "phash": (0b111 << 2 * i) + 0xFFFF_0000_0000_0000,  # 4 bits apart at least
        "constant": False,
        "decoded": True,
        "error": "",
    }


def spoil(frame: pd.DataFrame, rows: list[int], reason: str = "truncated") -> None:
    frame.loc[rows, "decoded"] = False
    frame.loc[rows, "split"] = "none"
    frame.loc[rows, "error"] = reason
    frame.loc[rows, "phash"] = 0
    frame.loc[rows, ["width", "height", "packed", "mean", "std"]] = None


@pytest.fixture
def manifest(tmp_path: Path) -> pd.DataFrame:
    """Twenty good images in two classes, as read from a file."""
    rows = [row(i) for i in range(20)]
    columns = {name: [entry[name] for entry in rows] for name in rows[0]}
    columns["phash"] = pa.array(columns["phash"], pa.uint64())
    write_manifest(tmp_path / "manifest.parquet", pa.table(columns))
    return read_manifest(tmp_path / "manifest.parquet")


def statistics(cats: int, dogs: int, value: int = 100, image_size: int = 8) -> DataStatistics:
    """Of images that are half black, half `value`."""
    images = cats + dogs
    half = images * image_size**2 // 2
    return DataStatistics(
        name="pets",
        digest=f"{cats:032x}{value:032x}",
        image_size=image_size,
        channels=3,
        classes={"cat": cats, "dog": dogs},
        images=images,
        sums=[half * value] * 3,
        squares=[half * value**2] * 3,
    )


def failed(
    frame: pd.DataFrame,
    info: DatasetInfo = INFO,
    params: ValidateParams = PARAMS,
    accepted: DataStatistics | None = None,
    current: DataStatistics | None = None,
) -> dict[str, Finding]:
    drift = measure(accepted, current) if accepted and current else None
    return {finding.name: finding for finding in check(frame, info, params, SUITE, drift) if not finding.success}


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


def alike(frame: pd.DataFrame) -> None:
    frame.loc[6, "phash"] = frame.loc[5, "phash"] ^ 0b11


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
    "modes_known": (set_cells("mode", "CMYK", [5]), [DOG]),
    "rows_complete": (set_cells("width", None, [5]), [DOG]),
    "no_leak": (set_cells("sha256", f"{0:064x}", [6]), ["cat/00.png", CAT]),
    "enough_per_class": (one_class_small, ["class dog"]),
    "few_constant": (set_cells("constant", True, [5, 6]), [DOG, CAT]),
    "no_duplicates": (set_cells("sha256", f"{5:064x}", [6]), [DOG, CAT]),
    "few_near_duplicates": (alike, [DOG, CAT]),
    "balanced": (unbalanced, ["class dog"]),
    "not_enlarged": (set_cells("height", 7, [5]), [DOG]),
}


OF_THE_DATASET = ["class_drift", "channel_drift"]


def test_every_expectation_of_the_suite_has_its_violation() -> None:
    entries = json.loads(SUITE.read_text())["expectations"]
    assert [entry["meta"]["name"] for entry in entries] == [*VIOLATIONS, *OF_THE_DATASET]


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violated_expectation_fails_and_names_the_offenders(manifest: pd.DataFrame, name: str) -> None:
    change, offenders = VIOLATIONS[name]
    change(manifest)
    finding = failed(manifest)[name]
    assert names(finding) == offenders
    assert finding.count == len(offenders)


COLUMNS_WITH_A_VALUE = ["format", "mode", "width", "height", "bytes", "packed", "mean", "std", "constant", "error"]


def test_missing_value_of_a_decoded_image_is_critical_and_shown(manifest: pd.DataFrame) -> None:
    """Another column in each of the first rows."""
    paths = manifest["path"].tolist()
    for row, column in enumerate(COLUMNS_WITH_A_VALUE):
        manifest[column] = manifest[column].astype(object)
        manifest.loc[row, column] = None
    finding = failed(manifest)["rows_complete"]
    assert finding.severity == CRITICAL
    assert names(finding) == paths[: len(COLUMNS_WITH_A_VALUE)]


THRESHOLDS: dict[str, tuple[Callable[[pd.DataFrame], None], dict[str, Any]]] = {
    "decodable": (lambda frame: spoil(frame, [5, 6]), {"max_undecodable": 2}),
    "modes_known": (set_cells("mode", "CMYK", [5]), {"modes": ["RGB", "CMYK"]}),
    "no_leak": (set_cells("sha256", f"{0:064x}", [6]), {"max_in_both_splits": 2}),
    "enough_per_class": (one_class_small, {"min_images_per_class": 4}),
    "few_constant": (set_cells("constant", True, [5, 6]), {"max_constant_share": 0.1}),
    "few_near_duplicates": (alike, {"max_near_duplicate_share": 0.1}),
    "balanced": (unbalanced, {"max_imbalance": 2.5}),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_threshold_of_the_parameters_decides(manifest: pd.DataFrame, name: str) -> None:
    change, allowed = THRESHOLDS[name]
    change(manifest)
    assert name in failed(manifest)
    assert name not in failed(manifest, params=PARAMS.model_copy(update=allowed))


def test_any_mode_passes_where_the_parameters_name_none(manifest: pd.DataFrame) -> None:
    set_cells("mode", "CMYK", [5])(manifest)
    assert failed(manifest, params=PARAMS.model_copy(update={"modes": None})) == {}


def test_mode_of_an_undecodable_image_is_no_offence(manifest: pd.DataFrame) -> None:
    spoil(manifest, [5])
    set_cells("mode", "I;16B", [5])(manifest)
    assert failed(manifest) == {}


def test_exact_copies_are_duplicates_and_not_near_duplicates(manifest: pd.DataFrame) -> None:
    manifest.loc[6, ["sha256", "phash"]] = manifest.loc[5, ["sha256", "phash"]]
    assert list(failed(manifest)) == ["no_duplicates"]


def test_near_duplicate_names_its_partner(manifest: pd.DataFrame) -> None:
    alike(manifest)
    finding = failed(manifest)["few_near_duplicates"]
    assert [(o.reason, o.row, o.partner) for o in finding.offenders] == [
        (f"looks like {CAT}", 5, 6),
        (f"looks like {DOG}", 6, 5),
    ]
    assert finding.observed == "2 of 20 rows, a share of 0.1"


def test_unlabelled_data_is_one_class_without_a_name(manifest: pd.DataFrame) -> None:
    manifest["label"] = 0
    manifest["class_name"] = ""
    unlabelled = INFO.model_copy(update={"classes": []})
    assert failed(manifest, unlabelled) == {}
    spoil(manifest, list(range(16)))
    found = failed(manifest, unlabelled)
    assert list(found) == ["decodable", "enough_per_class"]
    assert names(found["enough_per_class"]) == ["all images"]


def test_offenders_within_a_limit_are_named_without_a_failure(manifest: pd.DataFrame) -> None:
    spoil(manifest, [5])
    finding = check(manifest, INFO, PARAMS, SUITE)[0]
    assert (finding.success, finding.count, names(finding)) == (True, 1, [DOG])


def test_all_offenders_are_counted_and_the_first_are_named(manifest: pd.DataFrame) -> None:
    frame = pd.concat([manifest] * 3, ignore_index=True)
    frame["path"] = [f"{i:02d}" for i in range(60)]
    frame["packed"] = "1x8x8"
    frame.loc[1:, "constant"] = True
    found = failed(frame)
    for name, first in (("size_as_declared", 0), ("few_constant", 1)):
        assert found[name].count == 60 - first
        assert names(found[name]) == [f"{i:02d}" for i in range(first, first + SHOWN)]
    copies = names(found["no_duplicates"])
    assert copies[:6] == ["00", "20", "40", "01", "21", "41"]
    assert found["no_duplicates"].count == 60


DRIFTED = {
    "class_drift": (statistics(10, 10), statistics(14, 6)),  # 0.2
    "channel_drift": (statistics(10, 10), statistics(10, 10, value=140)),  # 20 of 50
}


@pytest.mark.parametrize("name", DRIFTED)
def test_drift_beyond_its_threshold_is_a_warning(manifest: pd.DataFrame, name: str) -> None:
    accepted, current = DRIFTED[name]
    found = failed(manifest, accepted=accepted, current=current)
    assert list(found) == [name]
    assert found[name].compares
    assert found[name].observed.startswith({"class_drift": "0.2", "channel_drift": "0.4, red"}[name])
    assert failure_message("pets", list(found.values())) == ""
    allowed = PARAMS.model_copy(update={f"max_{name}": 0.5})
    assert failed(manifest, params=allowed, accepted=accepted, current=current) == {}


def test_accepted_data_of_another_size_or_other_classes_is_a_warning_that_says_so(manifest: pd.DataFrame) -> None:
    found = failed(manifest, accepted=statistics(10, 10, image_size=16), current=statistics(10, 10))
    assert list(found) == ["channel_drift"]
    assert "the accepted images are 3x16x16, these are 3x8x8" in found["channel_drift"].observed
    other = statistics(10, 10).model_copy(update={"classes": {"cat": 10, "fox": 10}})
    found = failed(manifest, accepted=other, current=statistics(10, 10))
    assert "1 new: dog; 1 vanished: fox" in found["class_drift"].observed


def test_without_an_accepted_data_set_drift_passes_and_says_why(manifest: pd.DataFrame) -> None:
    drift = check(manifest, INFO, PARAMS, SUITE)[-2:]
    assert [finding.name for finding in drift] == OF_THE_DATASET
    assert all(finding.success and finding.observed.startswith("no accepted data set") for finding in drift)


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
    def refused(change: Callable[[list[dict[str, Any]]], object]) -> str:
        entries = json.loads(SUITE.read_text())["expectations"]
        change(entries)
        path = tmp_path / "suite.json"
        path.write_text(json.dumps({"name": "images", "expectations": entries}))
        with pytest.raises(InputError) as error:
            check(manifest, INFO, PARAMS, path)
        return str(error.value)

    assert "table 'rows'; expected one of images" in refused(lambda entries: entries[0]["meta"].update(table="rows"))
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
