"""`darkroom data <command>`: accept a data set, compare with the accepted one, fetch what has changed on S3."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError

if TYPE_CHECKING:
    from darkroom.data.statistics import DataStatistics
    from darkroom.data.validation.drift import AcceptedData, Drift
    from darkroom.workspace import Workspace

WITHIN, BEYOND = 0, 1
_CHANGES = 10  # classes in the table of drift


def add_commands(commands: Any) -> None:
    """Add `data` with its commands to the parser's; each sets `command`, like the others."""
    text = "accept a data set, compare with the accepted one, fetch from S3"
    group = commands.add_parser("data", help=text, description=text)
    group = group.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[["Workspace", argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = group.add_parser(name, help=text.split(":")[0], description=text)
        sub.add_argument("--json", action="store_true", help="print JSON on stdout")
        sub.set_defaults(command=command)
        return sub

    sub = add("accept", _accept, "make the prepared data set the accepted one: later ones are compared with it")
    sub.add_argument("--reason", metavar="TEXT", required=True, help="why; kept in expectations/accepted.json")
    add("drift", _drift, "compare the prepared data set with the accepted one: exit code 1 beyond a threshold")
    add("sync", _sync, "bring data/raw up to date with S3: fetches what is new or changed, removes what is gone")


def _accept(workspace: "Workspace", options: argparse.Namespace) -> int:
    import getpass
    import os
    from datetime import UTC, datetime

    from darkroom.data.validation.drift import ACCEPTED_FILE, read_accepted, write_accepted

    if not options.reason.strip():
        raise InputError("--reason: accepting a data set needs a reason")
    path = workspace.expectations.with_name(ACCEPTED_FILE)
    current = _prepared(workspace)
    _refuse_unvalidated(workspace, current)
    accepted = read_accepted(path)
    changed = accepted is None or accepted.digest != current.digest
    if changed:
        try:
            who = getpass.getuser()
        except (KeyError, OSError):  # a container has no name for its user
            who = str(os.getuid())
        write_accepted(path, current, who, datetime.now(UTC).isoformat(timespec="seconds"), options.reason.strip())
        accepted = read_accepted(path)
    assert accepted is not None
    if options.json:
        _print_json(_described(accepted) | {"changed": changed})
    elif changed:
        print(f"{current.name} {current.digest[:12]} is the accepted data set now; commit {path}")
    else:
        print(f"{current.name} {current.digest[:12]} is the accepted data set already; {_by(accepted)}")
    return WITHIN


def _prepared(workspace: "Workspace") -> "DataStatistics":
    """What prepare wrote, if both of its files are of one data set."""
    from darkroom.data.dataset import load_info
    from darkroom.data.statistics import STATISTICS_FILE, read_statistics

    info, statistics = load_info(workspace.prepared), read_statistics(workspace.prepared)
    if info.digest != statistics.digest:
        raise InputError(
            f"{workspace.prepared / STATISTICS_FILE}: of data set {statistics.digest[:12]}, dataset.json is of "
            f"{info.digest[:12]}; run the prepare stage again"
        )
    return statistics


def _refuse_unvalidated(workspace: "Workspace", current: "DataStatistics") -> None:
    from darkroom.files import read_json

    path = workspace.reports / "validation.json"
    advice = "only data that passed validation can be accepted: run `dvc repro validate`"
    try:
        report = read_json(path)
        success, digest = report["success"], str(report["dataset"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {advice}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: cannot be read; {advice}") from None
    if digest != current.digest:
        raise InputError(f"{path}: of data set {digest[:12]}, prepared is {current.digest[:12]}; {advice}")
    if success is not True:
        raise InputError(f"{path}: the data set failed; {advice}")


def _drift(workspace: "Workspace", options: argparse.Namespace) -> int:
    import dataclasses

    from darkroom.data.validation.drift import ACCEPTED_FILE, NOTHING_ACCEPTED, measure, read_accepted

    path = workspace.expectations.with_name(ACCEPTED_FILE)
    accepted = read_accepted(path)
    if accepted is None:
        raise InputError(f"{path}: {NOTHING_ACCEPTED}")
    drift, params = measure(accepted, _prepared(workspace)), workspace.params().validate_
    verdicts = [
        ("class drift", drift.class_drift, "max_class_drift", params.max_class_drift),
        ("channel drift", drift.channel_drift, "max_channel_drift", params.max_channel_drift),
    ]
    within = all(amount is not None and amount <= limit for _, amount, _, limit in verdicts)
    if options.json:
        thresholds = {key: limit for _, _, key, limit in verdicts}
        shown = dataclasses.asdict(drift) | {"accepted": _described(accepted)}
        _print_json(shown | {"thresholds": thresholds, "within": within})
    else:
        _print_drift(drift, accepted)
        for name, amount, key, limit in verdicts:
            verdict = "not comparable" if amount is None else "within" if amount <= limit else "BEYOND"
            figure = "" if amount is None else f"{amount:.4f}"
            print(f"{name:<36}{figure:>12}  {verdict}, validate.{key} = {limit:g}")
    return WITHIN if within else BEYOND


def _print_drift(drift: "Drift", accepted: "AcceptedData") -> None:
    print(f"against {accepted.name} {accepted.digest[:12]}, {_by(accepted)}")
    if drift.same:
        print("the prepared data set is the accepted one")
    for reason in drift.reasons:
        print(f"not comparable: {reason}")
    if drift.class_drift is not None and drift.classes:
        print(f"{'class share':<36}{'accepted':>12}{'now':>12}{'change':>12}")
        for change in drift.classes[:_CHANGES]:
            print(
                f"  {_name(change.name):<34}{change.accepted:>12.2%}{change.current:>12.2%}"
                f"{change.current - change.accepted:>+12.2%}"
            )
        if len(drift.classes) > _CHANGES:
            print(f"  and {len(drift.classes) - _CHANGES:,} that changed less")
    for label, names in (("new", drift.new), ("vanished", drift.vanished)):
        if names and drift.class_drift is not None:
            print(f"  {len(names):,} {label}: {', '.join(map(_name, names[:_CHANGES]))}")
    if drift.channels:
        print(f"{'channel, 0 to 255':<36}{'accepted':>12}{'now':>12}{'drift':>12}")
    for channel in drift.channels:
        print(f"  {channel.name + ' mean':<34}{channel.accepted_mean:>12.2f}{channel.current_mean:>12.2f}")
        figures = f"{channel.accepted_std:>12.2f}{channel.current_std:>12.2f}{channel.drift:>12.4f}"
        print(f"  {channel.name + ' deviation':<34}{figures}")


def _name(name: str) -> str:
    """A class name as a terminal may have it."""
    from darkroom.data.validation.findings import word

    shown = word(name)
    return shown if len(shown) <= 32 else f"{shown[:31]}…"


def _by(accepted: "AcceptedData") -> str:
    from darkroom.data.validation.findings import word

    return f"accepted {accepted.when} by {word(accepted.who)}: {word(accepted.reason)}"


def _described(accepted: "AcceptedData") -> dict[str, Any]:
    return {name: getattr(accepted, name) for name in ("name", "digest", "images", "who", "when", "reason")}


def _sync(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.data.s3.sync import sync

    synced = sync(workspace)
    changes = {"new": synced.new, "changed": synced.changed, "removed": synced.removed}
    if options.json:
        _print_json({"uri": synced.uri, "files": synced.files, "bytes": synced.bytes, **changes})
    else:
        print(f"{synced.uri}: {synced.files:,} files, {synced.bytes / 1e6:,.1f} MB")
        print(", ".join(f"{number:,} {word}" for word, number in changes.items()))
        if any(changes.values()):
            print("data/raw has changed: `dvc repro` prepares it again")
    return WITHIN


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))
