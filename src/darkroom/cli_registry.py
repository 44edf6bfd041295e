"""`darkroom register`, `promote`, `lineage` and the other commands around the registry."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError

if TYPE_CHECKING:
    from darkroom.workspace import Workspace

Command = Callable[["Workspace", argparse.Namespace], int]

DONE, REFUSED = 0, 1
_URI = "models:/NAME@ALIAS or models:/NAME/VERSION"

_CHECKOUT = """\
Bring a version's project back: parameters, pipeline, dvc.lock, expectations and code as they were registered, and the
data and outputs from DVC's cache or remote. Afterwards `dvc repro` has nothing to do.

It works in a checkout of the project, in a fresh clone, and in an empty directory with MLFLOW_TRACKING_URI alone.
HEAD stays where it is: git shows the version's files as changes. Files with changes that exist nowhere else are listed
and left alone unless --force is given.

None of the version's code runs; the next `dvc repro`, `darkroom promote`, make target or flow here runs it. Data is
fetched from remotes that this project names and from those that you agree to, asked on a terminal or by --trust-remote.
"""


def add_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    """Add the commands with the parser's own `add(name, command, text)`."""
    add("register", _register, "make the EMA weights a model version: the same weights are always the same version")
    sub = add("promote", _promote, "let a version serve if it passes the gate: moves @champion, or says why not")
    sub.add_argument("--version", metavar="N", help="the version (default: the one at @challenger)")
    sub.add_argument("--force", action="store_true", help="pass over the gate's verdict; needs --reason")
    sub.add_argument("--reason", metavar="TEXT", help="why; kept in the history")
    sub = add("rollback", _rollback, "let the version that served before serve again: moves @champion to @previous")
    sub.add_argument("--reason", metavar="TEXT", required=True, help="why; kept in the history")
    add("history", _history, "list every promotion, refusal and rollback: the oldest first")
    add("status", _status, "show which versions serve and wait: with figures, and how to pull the champion")
    sub = add("lineage", _lineage, "show where a version comes from: commit, params, data, lock, run, scores, verdict")
    sub.add_argument("uri", nargs="?", metavar="URI", help=f"{_URI} (default: the champion)")
    sub.set_defaults(anywhere=True)
    sub = add("compare", _compare, "show two versions side by side: what they were made from, and their scores")
    sub.add_argument("uri", metavar="URI", help=_URI)
    sub.add_argument("other", nargs="?", metavar="URI", help="what to compare it with (default: the champion)")
    sub.set_defaults(anywhere=True)
    sub = add("score", _score, "measure a version under this project's protocol: the record is kept with the version")
    sub.add_argument("uri", metavar="URI", help=_URI)
    sub = add("checkout", _checkout, "bring back a version's params, lock, code and data: then `dvc repro` is idle")
    sub.description, sub.formatter_class = _CHECKOUT, argparse.RawDescriptionHelpFormatter
    sub.add_argument("uri", metavar="URI", help=_URI)
    sub.add_argument("--force", action="store_true", help="overwrite work that neither git nor DVC's cache holds")
    sub.add_argument(
        "--trust-remote",
        dest="trusted",
        action="append",
        default=[],
        metavar="URL",
        help="fetch from this remote of the version's though this project does not name it; may be repeated",
    )
    sub.add_argument("--no-data", dest="data", action="store_false", help="leave data and outputs as they are")
    sub.set_defaults(anywhere=True)


def here(anywhere: bool) -> "Workspace":
    """The project that holds the working directory; for some commands, the directory itself will do.

    Raises InputError outside a project, unless the command needs none and the environment says where models are kept.
    """
    from darkroom.workspace import Workspace

    try:
        return Workspace.find()
    except InputError as error:
        if not anywhere:
            raise
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise InputError(f"{error}; or set MLFLOW_TRACKING_URI to where the models are kept") from None
        return Workspace(Path.cwd())


def _register(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.promotion import register

    registered = register(workspace)
    if options.json:
        _print_json(dataclasses.asdict(registered))
        return DONE
    which = "new" if registered.created else "these weights were registered before"
    print(f"{registered.name} version {registered.version} ({which}), run {registered.run_id}")
    if registered.lost_run:
        print(f"the server had lost run {registered.lost_run}: the new one was made from what is on disk")
    return DONE


def _promote(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.promotion import promote

    promotion = promote(workspace, options.version, options.reason, options.force)
    if options.json:
        _print_json(dataclasses.asdict(promotion))
    elif not promotion.changed and promotion.promoted:
        print(promotion.reasons[0])
    else:
        _print_figures(promotion.figures)
        served = f"version {promotion.previous} served before" if promotion.previous else "it is the first"
        if promotion.promoted:
            relation = f" ({promotion.relation})" if promotion.relation and promotion.previous else ""
            print(f"version {promotion.version} is @champion now{relation}; {served}")
            _print_lines("in spite of", promotion.reasons, sys.stdout)
    if not promotion.promoted:
        stays = f"version {promotion.previous} stays" if promotion.previous else "there is still none"
        print(f"darkroom: version {promotion.version} is not promoted; @champion: {stays}", file=sys.stderr)
        _print_lines("because", promotion.reasons, sys.stderr)
        return REFUSED
    return DONE


def _rollback(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.promotion import rollback

    promotion = rollback(workspace, options.reason)
    if options.json:
        _print_json(dataclasses.asdict(promotion))
    else:
        print(f"version {promotion.version} is @champion again; version {promotion.previous} is marked as rolled back")
    return DONE


def _history(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.best import best_version
    from darkroom.registry.promotion import history

    decisions = history(workspace)
    best = best_version(workspace, decisions)
    _print_disagreements(workspace)
    if options.json:
        _print_json([dataclasses.asdict(entry) | {"best": entry.version_to == best} for entry in decisions])
        return DONE
    for entry in decisions:
        relation = f" ({entry.relation})" if entry.relation else ""
        mark = f"; {best} is the best so far" if best and entry.version_to == best else ""
        print(f"{entry.when}  {entry.who}  {entry.outcome}: {entry.route}{relation}{mark}")
        _print_lines("reason", [entry.reason] if entry.reason else [], sys.stdout)
        _print_lines("found", entry.findings, sys.stdout)
        _print_lines("!", [f"this entry was {entry.remark}"] if entry.remark else [], sys.stdout)
    if not decisions:
        print("no decision yet; `darkroom register` and `darkroom promote` make the first")
    return DONE


def _status(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.promotion import status
    from darkroom.registry.tracking import shown, tracking_uri

    found, name = status(workspace), workspace.params().registry.name
    _print_disagreements(workspace)
    if options.json:
        _print_json({"name": name, "tracking_uri": shown(tracking_uri(workspace)), **found})
        return DONE
    for alias, version in found.items():
        if version is None:
            print(f"@{alias}: none")
            continue
        commit = f", commit {version['git_commit'][:12]}" if version["git_commit"] else ""
        print(f"@{alias}: {name} version {version['version']}, weights {version['weights'][:12]}{commit}")
        _print_figures(version["figures"])
    if found["champion"]:
        print(
            f"\npull:   export MLFLOW_TRACKING_URI={shown(tracking_uri(workspace))}\n"
            f'        mlflow.pyfunc.load_model("models:/{name}@champion")\n'
            f"serve:  mlflow models serve -m models:/{name}@champion --env-manager local -p 5001"
        )
    return DONE


def _lineage(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.provenance import trace

    found = trace(workspace, options.uri or _champion(workspace, "lineage"))
    if options.json:
        record = None if found.record is None else found.record.to_json_dict()
        _print_json(dataclasses.asdict(dataclasses.replace(found, record=None)) | {"record": record})
    else:
        from darkroom.registry.screen import lineage_lines

        print(*lineage_lines(found), sep="\n")
    return DONE


def _compare(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.compare import compare

    found = compare(workspace, options.uri, options.other or _champion(workspace, "compare URI"))
    if options.json:
        figures = [
            dataclasses.asdict(figure) | {"difference": figure.difference, "beyond": figure.beyond}
            for figure in found.figures
        ]
        _print_json(dataclasses.asdict(found) | {"figures": figures})
    else:
        from darkroom.registry.screen import comparison_lines

        print(*comparison_lines(found), sep="\n")
    return DONE


def _score(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.lineage import score_figures
    from darkroom.registry.scoring import score

    scored = score(workspace, options.uri)
    if options.json:
        described = {"name": scored.name, "version": scored.version, "created": scored.created}
        _print_json(described | {"record": scored.record.to_json_dict()})
        return DONE
    _print_figures(score_figures(scored.record))
    when = "is" if scored.created else "was already"
    protocol = scored.record.protocol_digest[:12]
    print(f"{scored.name} version {scored.version} {when} scored under protocol {protocol}")
    return DONE


def _checkout(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.checkout import checkout

    asking = sys.stdin.isatty() and sys.stderr.isatty() and not options.json
    done = checkout(
        workspace,
        options.uri,
        force=options.force,
        data=options.data,
        trusted=options.trusted,
        agrees=_agrees if asking else lambda place: False,
        tell=lambda notice: None if options.json else print(notice, flush=True),
    )
    if options.json:
        _print_json(dataclasses.asdict(done))
    else:
        from darkroom.registry.screen import checkout_lines

        print(*checkout_lines(done), sep="\n")
    return DONE


def _agrees(place: str) -> bool:
    question = f"The version takes data from {place}, which this project does not name. Fetch from it? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _champion(workspace: "Workspace", command: str) -> str:
    if not workspace.params_file.is_file():
        raise InputError(f"outside a project the model has to be named: darkroom {command} models:/NAME@champion")
    return f"models:/{workspace.params().registry.name}@champion"


def _print_disagreements(workspace: "Workspace") -> None:
    """What was changed by hand, to stderr: it is no part of what was asked for."""
    from darkroom.registry.promotion import disagreements
    from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line

    with unavailable_is_one_line(tracking_uri(workspace)):
        lines = disagreements(connect(workspace), workspace.params().registry.name)
    for line in lines:
        print(f"darkroom: ! {line}", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def _print_figures(figures: dict[str, float]) -> None:
    for key, value in figures.items():
        print(f"  {key:<42}{value:10.4f}")


def _print_lines(label: str, lines: list[str], file: Any) -> None:
    for line in lines:
        print(f"  {label}{'' if label == '!' else ':'} {line}", file=file)
