"""From data to a champion as a Prefect flow: reproduce, register, gate, promote, record. `python -m flows.retrain`.

Without --ref it works in this checkout, with it in a workspace of its own, as deployed runs do. Exit code 0: a champion
serves, the new one or the one that was kept; 1: failed, or nothing serves.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from darkroom.errors import InputError, StageFailed
from darkroom.files import read_json
from darkroom.workspace import Workspace
from darkroom.yaml_text import parse_yaml
from flows import report
from flows.artifacts import human_size, never_fatal
from flows.champion import directions, headline
from flows.command import parser, run_flow
from flows.dvc_stage import Outcome
from flows.failures import EXPECTED, NotReady, failed
from flows.git import short_commit
from flows.notify import describe_run, ended_badly, notice, send
from flows.preflight import default_remote, problems_of_machine, problems_of_project
from flows.processes import follow_parent
from flows.release import Promotion, Registered, promote, register
from flows.reproduce import reproduce
from flows.settings import Settings
from flows.transfers import push, record, restore, sync
from flows.view import watched
from flows.workspaces import keep, workspace

CLONE_DELAYS = (10, 60)  # seconds before a repository that cannot be read is tried again


def _name() -> str:
    """The run's name: when it was due, of what, and the beginning of its id, so that no two are alike."""
    ref, root = flow_run.parameters.get("ref"), flow_run.parameters.get("root")
    commit = None
    with contextlib.suppress(InputError):  # the run itself will say so
        settings = Settings.from_environment()
        place = settings.repository if ref is not None else str(root or settings.project)
        commit = short_commit(place, ref or "HEAD")
    due = f"{flow_run.scheduled_start_time.astimezone():%Y-%m-%dT%H%M}"
    return "-".join(filter(None, ["retrain", due, commit, (flow_run.id or "")[:4]]))


@flow(
    name="retrain",
    flow_run_name=_name,
    persist_result=False,
    on_failure=[ended_badly],
    on_crashed=[ended_badly],
    on_cancellation=[ended_badly],
)
def retrain(
    ref: str | None = None, params: dict[str, Any] | None = None, force: bool = False, root: Path | None = None
) -> "State[str]":
    """Bring the pipeline up to date, register its model and let it serve if the gate agrees.

    With `ref`, a branch, tag or commit, in a workspace of its own, where `params` replace values of params.yaml by
    dotted keys; else in place, in the project at `root`. `force` runs every stage. Ends as Promoted, Unchanged (this
    model serves already) or Kept (refused; the champion stays), all Completed, with a report as the result; Failed as
    well if a refusal leaves nothing that serves. BadInput and NotReady name all that keeps the run from starting.
    """
    follow_parent()
    try:
        settings = Settings.from_environment()
        with contextlib.ExitStack() as stack:
            place = _prepare(stack, settings, ref, params, root)
            state = _make(settings, place, force)
            if place.own and not state.is_completed():
                keep(place.root, f"{state.name}: {state.message}")
            return state
    except EXPECTED as error:
        return failed(error)


@dataclass(frozen=True)
class _Place:
    """Where a run works; `own`: a workspace, which is nobody's checkout."""

    root: Path
    own: bool


def _prepare(
    stack: contextlib.ExitStack,
    settings: Settings,
    ref: str | None,
    params: dict[str, Any] | None,
    root: Path | None,
) -> _Place:
    """Make the place to work in and look at what the run will need. Raises InputError with all that is wrong."""
    problems: list[str] = []
    place: _Place | None = None
    if ref is None:
        if params:
            raise InputError("params: they are replaced in a workspace, so the run needs a ref as well; HEAD, say")
        place = _Place(Workspace(root or settings.project).root, own=False)
    else:
        name, log = flow_run.name or "retrain", get_run_logger().info

        @task(
            cache_policy=NO_CACHE,
            task_run_name="workspace",
            persist_result=False,
            retries=len(CLONE_DELAYS),
            retry_delay_seconds=list(CLONE_DELAYS),
            retry_condition_fn=lambda task, run, state: state.name == "Failed",
        )
        def enter() -> "State[Path]":
            try:
                return Completed(data=stack.enter_context(workspace(name, ref, params, log)))
            except EXPECTED as error:
                return failed(error)

        entered = cast("State[Path]", enter(return_state=True))
        if entered.is_completed():
            place = _Place(entered.result(), own=True)
        elif entered.name == "BadInput":
            problems = (entered.message or "").splitlines()
        else:
            raise StageFailed(entered.message)
    checked = cast("State[str]", preflight(place.root if place else None, problems, return_state=True))
    if checked.name == "NotReady":
        raise NotReady(checked.message)
    if not checked.is_completed() or place is None:
        raise InputError(checked.message)
    return place


def _make(settings: Settings, place: _Place, force: bool) -> "State[str]":
    """From data to a decision, and its record."""
    root = place.root
    if place.own:
        synced = cast("State[Any]", sync(root, return_state=True))
        if not synced.is_completed():
            return _same(synced)
        if not force:
            restore(root, return_state=True)
    reproduced = cast("State[list[Outcome]]", reproduce(root, force, return_state=True))
    if not reproduced.is_completed():
        return _same(reproduced)
    registered = watched("register", lambda: cast("State[Registered]", register(root, return_state=True)))
    if not registered.is_completed():
        return _same(registered)
    version = registered.result()
    promoted = watched("promote", lambda: cast("State[Promotion]", promote(root, version, return_state=True)))
    if not promoted.is_completed():
        return _same(promoted)
    ended, name = promoted.result(), promoted.name or ""

    _tell(settings, name, version, ended)
    if default_remote(root):
        push(root, return_state=True)
    if place.own:
        record(root, f"{name.lower()}: version {version.version} of {version.name}", return_state=True)
    champion = _serving(root, version, ended)
    text = _report(root, name, version, ended, champion, reproduced.result())
    with never_fatal():
        create_markdown_artifact(key="retrain", markdown=text, description="What was computed, and what serves now")
    if champion is None:
        return Failed(name="Refused", message="Nothing serves: " + "; ".join(ended.reasons))
    return Completed(name=name, message=f"version {champion['version']} of {version.name} serves", data=text)


@task(cache_policy=NO_CACHE, task_run_name="preflight", persist_result=False)
def preflight(root: Path | None, problems: list[str]) -> "State[str]":
    """Say all that keeps a run in the project at `root` from working, with the `problems` of what was asked for.

    BadInput if there are such problems, else NotReady: then the same run works once the machine or a bucket is mended.
    """
    around = problems_of_machine(Settings.from_environment()) + (problems_of_project(root) if root else [])
    if found := [*problems, *around]:
        name = "BadInput" if problems else "NotReady"
        return Failed(name=name, message="\n".join(dict.fromkeys(found)))
    return Completed(message="nothing stands against the run")


def _same(state: State[Any]) -> State[str]:
    return Failed(name=state.name, message=state.message)


def _serving(root: Path, version: Registered, ended: Promotion) -> dict[str, Any] | None:
    """What serves now, as `darkroom status` describes it."""
    number = ended.version if ended.promoted else ended.previous
    if number is None or (version.champion or {}).get("version") == number:
        return version.champion
    weights = read_json(Workspace(root).served_model / "model.json")["weights_digest"] if ended.promoted else "unknown"
    return {"version": number, "weights": weights, "figures": report.figures_of(ended.promoted, ended)}


def _tell(settings: Settings, name: str, version: Registered, ended: Promotion) -> None:
    """Tell the webhook of a promotion or a refusal."""
    if name != "Unchanged":
        content = notice(
            "promoted" if ended.promoted else "refused",
            run=describe_run(),
            reasons=ended.reasons,
            model=version.name,
            version=version.version,
            previous=ended.previous,
            figures=report.figures_of(True, ended),
        )
        send(settings.webhook, content, get_run_logger().warning)


def _report(
    root: Path, name: str, version: Registered, ended: Promotion, champion: dict[str, Any] | None, stages: list[Outcome]
) -> str:
    from darkroom.registry.tracking import tracking_uri

    place = Workspace(root)
    before = (version.champion or {}).get("figures", {})
    mine = report.figures_of(True, ended) or before
    titles = (f"version {version.version}", f"version {ended.previous}")
    try:
        serves = headline(place, champion) if champion else ""
        gate = report.gate_table(place.params().registry.gate, ended)
    except InputError:  # parameters of a commit that is newer or older than this checkout; its own code has judged
        serves = gate = ""
    parts = [
        report.verdict(name, version, ended),
        serves,
        gate,
        report.figures_table(mine, before if mine != before else {}, titles),
        report.stages_table([(o.stage, o.name, o.seconds, human_size(o.size)) for o in stages]),
        report.links(tracking_uri(place), version),
    ]
    return "\n\n".join(filter(None, parts))


def main(arguments: list[str]) -> int:
    """Run the flow for the project that holds the working directory; the exit code says how it ended."""
    options = parser("flows.retrain", "Make a model and let it serve if it is good enough.")
    options.add_argument("--ref", help="work on this branch, tag or commit in a workspace of its own (default: here)")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="with --ref: a parameter")
    chosen = options.parse_args(arguments)
    try:
        params = _assignments(chosen)
    except InputError as error:
        options.error(str(error))

    def run(place: Workspace) -> State[Any]:
        where = None if chosen.ref else place.root
        return cast("State[str]", retrain(chosen.ref, params, chosen.force, where, return_state=True))

    def told(place: Workspace, state: State[Any]) -> str:
        return "\n\n".join(["", state.result().replace("**", ""), directions(place)]) + "\n"

    return run_flow(run, told, title="retrain", parts=("register", "promote"))


def _assignments(chosen: argparse.Namespace) -> dict[str, Any] | None:
    """`--set train.steps=2000` as parameters; values are YAML. Raises InputError."""
    params = {}
    for text in chosen.set:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise InputError(f"--set {text}: expected KEY=VALUE, such as train.steps=2000")
        try:
            params[key] = parse_yaml(value)
        except yaml.YAMLError:
            raise InputError(f"--set {key}: its value is not YAML; expected KEY=VALUE, such as a.b=1") from None
    if params and not chosen.ref:
        raise InputError("--set needs --ref: a run with other parameters gets a workspace of its own; --ref HEAD, say")
    return params or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
