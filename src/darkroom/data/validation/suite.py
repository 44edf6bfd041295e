"""Runs the hand-written expectation suite on the manifest with Great Expectations and says which images fail it.

The suite (`expectations/images.json`) is a Great Expectations suite without ids. Beside what the library defines, every
expectation has a `severity` (critical stops the pipeline, warning is reported) and in `meta`:
    name      what messages and reports call it
    expected  in words; ${parameter} stands for a parameter's value
    table     what has a row for what: images (the manifest, default), classes, or dataset (the drift, one row)
    show      columns that tell the reader why a row fails
    order     column to sort the offenders by, so that copies of an image stand together
`{"$PARAMETER": "name"}` in `kwargs` is substituted by Great Expectations itself.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from darkroom.data.dataset import DatasetInfo
from darkroom.data.manifest import COLUMNS
from darkroom.data.validation.derived import classes_frame, images_frame
from darkroom.data.validation.drift import NOTHING_ACCEPTED, Drift
from darkroom.data.validation.findings import CRITICAL, SHOWN, WARNING, Finding, Offender, word
from darkroom.errors import InputError
from darkroom.files import read_json
from darkroom.params import ValidateParams

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("images", "classes", "dataset")


def check(
    manifest: pd.DataFrame, info: DatasetInfo, params: ValidateParams, suite_file: Path, drift: Drift | None = None
) -> list[Finding]:
    """Run the suite; a finding per expectation, in the suite's order. `drift` is None where no data set was accepted.

    Raises InputError for a suite that cannot run and for a manifest without the columns that prepare writes.
    """
    entries = _read_suite(suite_file)
    for column in COLUMNS:
        if column not in manifest:
            raise InputError(f"dataset {info.name}: the manifest has no column {column}; run the prepare stage again")
    tables = dict(zip(TABLES, _tables(manifest, info, params, drift), strict=True))
    shape = "x".join(map(str, (info.channels, info.image_size, info.image_size)))
    labels = list(range(max(len(info.classes), 1)))
    parameters = {
        **params.model_dump(),
        "labels": labels,
        "last_label": labels[-1],
        "classes": info.classes or [""],
        "packed": [shape],
        "image_size": info.image_size,
    }
    words = {**parameters, "packed": shape, "modes": ", ".join(params.modes or ["any"])}
    results = _validate(tables, entries, parameters, suite_file)
    return [
        _finding(entry, results[entry["meta"]["name"]], tables[_table(entry)], words, drift=drift) for entry in entries
    ]


def _tables(
    manifest: pd.DataFrame, info: DatasetInfo, params: ValidateParams, drift: Drift | None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    images = images_frame(manifest, params)
    amounts = (drift.class_drift, drift.channel_drift) if drift else (0.0, 0.0)
    # What cannot be compared is beyond every threshold.
    dataset = pd.DataFrame([[np.inf if x is None else x for x in amounts]], columns=["class_drift", "channel_drift"])
    return images, classes_frame(images, info), dataset


def _table(entry: dict[str, Any]) -> str:
    return str(entry["meta"].get("table", TABLES[0]))


def _read_suite(path: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = read_json(path)["expectations"]
        names = [entry["meta"]["name"] for entry in entries]
        for name, entry in zip(names, entries, strict=True):
            entry["meta"]["expected"]
            if entry["severity"] not in (CRITICAL, WARNING):
                raise InputError(f"{path}: {name}: severity {entry['severity']!r}; expected {CRITICAL} or {WARNING}")
            if _table(entry) not in TABLES:
                raise InputError(f"{path}: {name}: table {_table(entry)!r}; expected one of {', '.join(TABLES)}")
            # The library takes a range without ends for one that everything is in.
            if entry["type"].endswith("_between") and not {"min_value", "max_value"} & set(entry["kwargs"]):
                raise InputError(f"{path}: {name}: expected min_value or max_value in kwargs")
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
    tables: dict[str, pd.DataFrame], entries: list[dict[str, Any]], parameters: dict[str, Any], suite_file: Path
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
    source = context.data_sources.add_pandas("prepared")
    results: list[dict[str, Any]] = []
    for table, frame in tables.items():
        suite, named = gx.ExpectationSuite(name=table), set()
        for entry in entries:
            if _table(entry) != table:
                continue
            # Built one by one: given the whole list, the suite leaves an expectation that is not valid out and goes on.
            try:
                suite.expectations.append(ExpectationConfiguration(**entry).to_domain_obj())
            except Exception as error:  # pydantic's, the library's, TypeError: it has no one error for a mistake
                raise InputError(f"{suite_file}: {entry['meta']['name']}: {' '.join(str(error).split())}") from None
            named |= {text for value in entry["kwargs"].values() for text in _texts(value)}
        # The library hashes every cell of what it is given, so it gets the columns that the suite names.
        columns = {"dataframe": frame[[name for name in frame if name in named]]}
        batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all").get_batch(columns)
        try:
            outcome = batch.validate(
                context.suites.add(suite),
                expectation_parameters=parameters,
                # COMPLETE would make a dictionary per failing row, of a million perhaps.
                result_format={"result_format": "SUMMARY", "partial_unexpected_count": SHOWN},
            )
        except GreatExpectationsError as error:
            raise InputError(f"{suite_file}: {' '.join(str(error).split())}") from None
        results += [dict(result.to_json_dict()) for result in outcome.results]
    return {result["expectation_config"]["meta"]["name"]: result for result in results}


def _texts(value: object) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _finding(
    entry: dict[str, Any], result: dict[str, Any], frame: pd.DataFrame, words: dict[str, Any], drift: Drift | None
) -> Finding:
    meta, found, success = entry["meta"], result["result"], bool(result["success"])
    failing = _failing(entry, found, frame)
    count, rows = failing or (0, [])
    if _table(entry) == "dataset":
        observed = _drift_sentence(entry, drift)
    elif not found:
        observed = _exception(result["exception_info"])
    elif missing := found.get("partial_missing_list"):
        observed = f"missing {', '.join(map(word, missing))}"
    elif failing:
        unit = "classes" if _table(entry) == "classes" else "rows"
        observed = f"{count:,} of {len(frame):,} {unit}" if count else f"{len(frame):,} {unit} pass"
        if count and entry["type"] == "expect_column_mean_to_be_between":
            observed += f", a share of {count / len(frame):.4g}"
    else:
        value = found.get("observed_value")
        observed = "all present" if value is None and success else word(value)
    return Finding(
        name=meta["name"],
        severity=entry["severity"],
        expected=Template(meta["expected"]).safe_substitute(words),
        success=success,
        observed=observed,
        count=count,
        offenders=tuple(_offender(frame, row, meta) for row in rows),
        compares=_table(entry) == "dataset",
    )


def _failing(entry: dict[str, Any], found: dict[str, Any], frame: pd.DataFrame) -> tuple[int, list[int]] | None:
    """How many rows fail, and the first of them: as the library says, or those whose flag it has summed up.

    None for an expectation that is not about single rows.
    """
    column, order = entry["kwargs"].get("column"), entry["meta"].get("order")
    if "unexpected_count" in found:
        return found["unexpected_count"], [int(row) for row in found.get("partial_unexpected_index_list") or []]
    if column not in frame or frame[column].dtype != bool:
        return None
    rows = np.flatnonzero(frame[column].to_numpy())
    if order:
        rows = rows[np.argsort(frame[order].to_numpy()[rows], kind="stable")]
    return len(rows), rows[:SHOWN].tolist()


def _offender(frame: pd.DataFrame, row: int, meta: dict[str, Any]) -> Offender:
    values, show = frame.iloc[row], meta.get("show", [])
    if meta.get("table") == "classes":
        name = f"class {word(values['class_name'])}" if values["class_name"] else "all images"
        return Offender(name, _reason(values, show))
    if show == ["partner"]:
        partner = int(values["partner"])
        return Offender(word(values["path"]), f"looks like {word(frame['path'].iloc[partner])}", row, partner)
    return Offender(word(values["path"]), _reason(values, show), row)


def _reason(values: pd.Series[Any], show: list[str]) -> str:
    if show == ["error"]:
        return word(values["error"])
    return ", ".join(f"{name} {word(values[name])}" for name in show if name in values)


def _drift_sentence(entry: dict[str, Any], drift: Drift | None) -> str:
    if drift is None:
        return NOTHING_ACCEPTED
    return drift.class_sentence() if entry["kwargs"].get("column") == "class_drift" else drift.channel_sentence()


def _exception(info: dict[str, Any]) -> str:
    """An expectation that could not be evaluated fails with its reason, once or per metric, in `exception_info`."""
    details = [info] if "exception_message" in info else [info[key] for key in sorted(info)]
    messages = sorted({str(detail["exception_message"]) for detail in details if detail.get("raised_exception")})
    return " ".join("; ".join(messages).split()) or "not evaluated"
