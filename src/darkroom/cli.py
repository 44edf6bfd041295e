"""`darkroom <command>`: the registry at the command line. Each command imports what it needs: --help is quick."""

import argparse
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from darkroom import __version__
from darkroom.errors import InputError, Interrupted, StageFailed

if TYPE_CHECKING:
    from darkroom.workspace import Workspace

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75

_EPILOG = """\
exit codes: 0 done, 1 failed or refused by the gate, 2 bad input or parameters, 75 interrupted with state saved.
MLFLOW_TRACKING_URI says where runs and models are kept; the default is a database in .darkroom/ of the project.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run one command in the project that holds the working directory, and exit with its code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("darkroom").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by a supervisor like by Ctrl-C
    sys.exit(_outcome(options.command, options))


def _outcome(command: Callable[["Workspace", argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit code of a command; what went wrong is printed to stderr. Defects keep their traceback."""
    from darkroom.workspace import Workspace

    try:
        return command(Workspace.find(), options)
    except InputError as error:
        return _fail(error, BAD_INPUT)
    except Interrupted as error:
        return _fail(error, INTERRUPTED)
    except StageFailed as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; the registry is as it was", 130)


def _fail(message: object, code: int) -> int:
    print(*(f"darkroom: {line}" for line in str(message).splitlines()), sep="\n", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom",
        description="Keeps a class-conditional diffusion model in production: `dvc repro` computes, this ships.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"darkroom {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[["Workspace", argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text.split(":")[0], description=text)
        sub.add_argument("--json", action="store_true", help="print JSON on stdout")
        sub.set_defaults(command=command)
        return sub

    add("register", _register, "make the EMA weights a model version: the same weights are always the same version")
    sub = add("promote", _promote, "let a version serve if it passes the gate: moves @champion, or says why not")
    sub.add_argument("--version", metavar="N", help="the version (default: the one at @challenger)")
    sub.add_argument("--force", action="store_true", help="pass over the gate's verdict; needs --reason")
    sub.add_argument("--reason", metavar="TEXT", help="why; kept in the history")
    sub = add("rollback", _rollback, "let the version that served before serve again: moves @champion to @previous")
    sub.add_argument("--reason", metavar="TEXT", required=True, help="why; kept in the history")
    add("history", _history, "list every promotion, refusal and rollback: the oldest first")
    add("status", _status, "show which versions serve and wait: with figures, and how to pull the champion")
    add("params", _params, "check params.yaml: prints each mistake, or that there is none")
    return parser


def _register(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.promotion import register

    registered = register(workspace)
    if options.json:
        _print_json(dataclasses.asdict(registered))
    else:
        which = "new" if registered.created else "these weights were registered before"
        print(f"{registered.name} version {registered.version} ({which}), run {registered.run_id}")
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
            print(f"version {promotion.version} is @champion now; {served}")
            _print_lines("in spite of", promotion.reasons, sys.stdout)
    if not promotion.promoted:
        stays = f"version {promotion.previous} stays" if promotion.previous else "there is still none"
        print(f"darkroom: version {promotion.version} is not promoted; @champion: {stays}", file=sys.stderr)
        _print_lines("because", promotion.reasons, sys.stderr)
        return FAILED
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
    from darkroom.registry.promotion import history

    decisions = history(workspace)
    if options.json:
        _print_json([dataclasses.asdict(decision) for decision in decisions])
        return DONE
    for entry in decisions:
        print(f"{entry.when}  {entry.who}  {entry.outcome}: {entry.version_from or 'none'} -> {entry.version_to}")
        _print_lines("reason", [entry.reason] if entry.reason else [], sys.stdout)
        _print_lines("found", entry.findings, sys.stdout)
    if not decisions:
        print("no decision yet; `darkroom register` and `darkroom promote` make the first")
    return DONE


def _status(workspace: "Workspace", options: argparse.Namespace) -> int:
    from darkroom.registry.promotion import status
    from darkroom.registry.tracking import shown, tracking_uri

    found, name = status(workspace), workspace.params().registry.name
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


def _params(workspace: "Workspace", options: argparse.Namespace) -> int:
    params = workspace.params()
    if options.json:
        _print_json(params.model_dump(mode="json", by_alias=True))
    else:
        print(f"{workspace.params_file}: ok")
    return DONE


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def _print_figures(figures: dict[str, float]) -> None:
    for key, value in figures.items():
        print(f"  {key:<36}{value:10.4f}")


def _print_lines(label: str, lines: list[str], file: Any) -> None:
    for line in lines:
        print(f"  {label}: {line}", file=file)
