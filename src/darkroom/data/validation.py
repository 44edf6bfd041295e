"""Runs the hand-written expectation suite on the manifest with Great Expectations and says which images fail it.

The suite (`expectations/images.json`) is a Great Expectations suite without ids. Beside what the library defines, every
expectation has a `severity` (critical stops the pipeline, warning is reported) and in `meta`:
    name      what messages and reports call it
    expected  in words; ${parameter} stands for a parameter's value
    rows      what the offenders are called by: path (default) or class_name
    show      columns that tell the reader why a row fails
    order     column to sort the offenders by, so that copies of an image stand together
`{"$PARAMETER": "name"}` in `kwargs` is substituted by Great Expectations itself.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from darkroom.data.dataset import DatasetInfo
from darkroom.data.manifest import Row
from darkroom.errors import InputError
from darkroom.files import read_json
from darkroom.params import ValidateParams

if TYPE_CHECKING:
    import pandas as pd

CRITICAL, WARNING = "critical", "warning"
SHOWN = 20  # offenders named in the reports; the count is always of all


@dataclass(frozen=True)
class Offender:
    """A row, or a class, that fails an expectation."""

    name: str
    reason: str
    row: int | None  # position in the manifest; None for a class


@dataclass(frozen=True)
class Finding:
    """What became of one expectation."""

    name: str
    severity: str
    expected: str
    success: bool
    observed: str
    offenders: list[Offender]  # all of them, in the order of the manifest

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "severity": self.severity,
            "expected": self.expected,
            "success": self.success,
            "observed": self.observed,
            "unexpected": len(self.offenders),
            "rows": [{"name": o.name, "reason": o.reason} for o in self.offenders[:SHOWN]],
        }


def derive(manifest: pd.DataFrame, info: DatasetInfo) -> pd.DataFrame:
    """The manifest with the columns that the suite needs and that no single row knows.

    row: position; undecodable, in_both_splits: flags; class_images: decodable images of the row's class;
    class_balance: those over the average class's; source_side: shorter side of the source image in pixels.
    """
    frame = manifest.reset_index(drop=True).copy()
    frame["row"] = range(len(frame))
    frame["undecodable"] = ~frame["decoded"].astype(bool)
    in_split = {name: set(frame.loc[frame["split"] == name, "sha256"].dropna()) for name in info.splits}
    frame["in_both_splits"] = frame["sha256"].isin(set.intersection(*in_split.values())) & (frame["split"] != "none")
    images = frame[frame["decoded"].astype(bool)].groupby("class_name").size()
    frame["class_images"] = frame["class_name"].map(images).fillna(0).astype(int)
    frame["class_balance"] = frame["class_images"] * len(info.classes) / max(int(images.sum()), 1)
    frame["source_side"] = frame[["width", "height"]].min(axis=1)
    return frame


def check(manifest: pd.DataFrame, info: DatasetInfo, params: ValidateParams, suite_file: Path) -> list[Finding]:
    """Run the suite; a finding per expectation, in the suite's order. Raises InputError for a suite that cannot run."""
    entries = _read_suite(suite_file)
    for column in fields(Row):
        if column.name not in manifest:
            raise InputError(
                f"dataset {info.name}: the manifest has no column {column.name}; run the prepare stage again"
            )
    frame = derive(manifest, info)
    shape = "x".join(map(str, (info.channels, info.image_size, info.image_size)))
    parameters = {
        **params.model_dump(),
        "labels": list(range(len(info.classes))),
        "last_label": len(info.classes) - 1,
        "classes": info.classes,
        "packed": [shape],
        "image_size": info.image_size,
    }
    words = {**parameters, "packed": shape}
    results = _validate(frame, entries, parameters, suite_file)
    return [_finding(entry, results[entry["meta"]["name"]], frame, words) for entry in entries]


def _read_suite(path: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = read_json(path)["expectations"]
        names = [entry["meta"]["name"] for entry in entries]
        for entry in entries:
            entry["meta"]["expected"]
            if entry["severity"] not in (CRITICAL, WARNING):
                raise InputError(
                    f"{path}: {entry['meta']['name']}: severity {entry['severity']!r}; expected {CRITICAL} or {WARNING}"
                )
            # The library takes a range without ends for one that everything is in.
            if entry["type"].endswith("_between") and not {"min_value", "max_value"} & set(entry["kwargs"]):
                raise InputError(f"{path}: {entry['meta']['name']}: expected min_value or max_value in kwargs")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: every expectation needs type, kwargs, severity, meta.name, meta.expected: {error}"
        ) from None
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: meta.name appears twice: {', '.join(repeated)}")
    if not any(entry["severity"] == CRITICAL for entry in entries):
        raise InputError(f"{path}: no {CRITICAL} expectation: nothing would stop bad data")
    return entries


def _validate(
    frame: pd.DataFrame, entries: list[dict[str, Any]], parameters: dict[str, Any], suite_file: Path
) -> dict[str, dict[str, Any]]:
    """Great Expectations' result per `meta.name`."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.WARNING)  # its import alone logs 200 lines
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.exceptions.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)  # sets its own to INFO
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    suite = gx.ExpectationSuite(name="images")
    for entry in entries:
        # Built one by one: given the whole list, the suite leaves an expectation that is not valid out and goes on.
        try:
            suite.expectations.append(ExpectationConfiguration(**entry).to_domain_obj())
        except Exception as error:  # pydantic's, the library's, TypeError: it has no one error for a mistake
            raise InputError(f"{suite_file}: {entry['meta']['name']}: {' '.join(str(error).split())}") from None
    suite = context.suites.add(suite)
    asset = context.data_sources.add_pandas("prepared").add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    try:
        outcome = batch.validate(
            suite,
            expectation_parameters=parameters,
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
        )
    except GreatExpectationsError as error:
        raise InputError(f"{suite_file}: {' '.join(str(error).split())}") from None
    results: list[dict[str, Any]] = [dict(result.to_json_dict()) for result in outcome.results]
    return {result["expectation_config"]["meta"]["name"]: result for result in results}


def _finding(entry: dict[str, Any], result: dict[str, Any], frame: pd.DataFrame, words: dict[str, Any]) -> Finding:
    meta = entry["meta"]
    found = result["result"]
    if "unexpected_count" in found:
        total = found["element_count"]
        observed = (
            f"{found['unexpected_count']} of {total} rows fail" if found["unexpected_count"] else f"{total} rows pass"
        )
    elif found:
        value = found.get("observed_value")
        observed = "all present" if value is None and result["success"] else _word(value)
        if missing := found.get("partial_missing_list"):
            observed = f"missing {', '.join(map(_word, missing))}"
    else:
        observed = _exception(result["exception_info"])
    offenders = [] if result["success"] else _offenders(entry, found, frame)
    return Finding(
        name=meta["name"],
        severity=entry["severity"],
        expected=Template(meta["expected"]).safe_substitute(words),
        success=bool(result["success"]),
        observed=observed,
        offenders=offenders,
    )


def _offenders(entry: dict[str, Any], found: dict[str, Any], frame: pd.DataFrame) -> list[Offender]:
    """The rows that Great Expectations names; for a sum or a mean of flags, the rows that have the flag."""
    meta, column = entry["meta"], entry["kwargs"].get("column")
    if "unexpected_index_list" in found:
        rows = sorted({int(index["row"]) for index in found["unexpected_index_list"]})
    elif column in frame and frame[column].dtype == bool:
        rows = [int(row) for row in frame.index[frame[column]]]
    else:
        return []
    chosen = frame.loc[rows]
    if "order" in meta:
        chosen = chosen.sort_values([meta["order"], "row"])
    show = [name for name in meta.get("show", []) if name in frame]
    if meta.get("rows") == "class_name":
        chosen = chosen.drop_duplicates("class_name")
        return [Offender(f"class {_word(r['class_name'])}", _reason(r, show), None) for _, r in chosen.iterrows()]
    return [Offender(_word(r["path"]), _reason(r, show), int(r["row"])) for _, r in chosen.iterrows()]


def _reason(row: pd.Series[Any], show: list[str]) -> str:
    if show == ["error"]:
        return _word(row["error"])
    return ", ".join(f"{name} {_word(row[name])}" for name in show)


def _word(value: object) -> str:
    """A value for a message: short, one line, nothing that a terminal would obey."""
    if value is None or value != value:
        return "missing"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if text.isprintable() else repr(text)


def _exception(info: dict[str, Any]) -> str:
    """An expectation that could not be evaluated fails with its reason, once or per metric, in `exception_info`."""
    details = [info] if "exception_message" in info else [info[key] for key in sorted(info)]
    messages = sorted({str(detail["exception_message"]) for detail in details if detail.get("raised_exception")})
    return " ".join("; ".join(messages).split()) or "not evaluated"


def failure_message(dataset: str, findings: list[Finding], shown: int = 5) -> str:
    """One line per failed critical expectation: what was expected, and the first offenders with their reason."""
    lines = []
    for finding in findings:
        if finding.success or finding.severity != CRITICAL:
            continue
        line = f'dataset {dataset}: expectation "{finding.name}" failed: expected {finding.expected}'
        named = [f"{o.name} ({o.reason})" if o.reason else o.name for o in finding.offenders[:shown]]
        if named:
            more = len(finding.offenders) - len(named)
            line += f", found {len(finding.offenders)}: {'; '.join(named)}{f'; and {more:,} more' if more else ''}"
        else:
            line += f", found: {finding.observed}"
        lines.append(line)
    return "\n".join(lines)
