"""From data to a champion as a Prefect flow: reproduce, register, gate, promote. `python -m flows.retrain [--force]`.

Exit code 0: a champion serves, the new one or the one that was kept; 1: failed, or nothing serves.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from darkroom.errors import InputError, StageFailed
from darkroom.workspace import Workspace
from flows.champion import directions, find_champion, headline
from flows.command import command
from flows.dvc_stage import Outcome
from flows.reproduce import reproduce, table

if TYPE_CHECKING:
    from darkroom.registry.promotion import Promotion, Registered

T = TypeVar("T")


@flow(name="retrain", flow_run_name="retrain", persist_result=False)
def retrain(root: Path, force: bool = False) -> "State[str]":
    """Bring the pipeline up to date, register its model and let it serve if the gate agrees.

    Ends as Promoted, Unchanged (this model serves already) or Kept (refused; the champion stays), all Completed, with a
    report as the result; Failed as well if a refusal leaves nothing that serves.
    """
    workspace = Workspace(root)
    reproduced = cast("State[list[Outcome]]", reproduce(root, force, return_state=True))
    if not reproduced.is_completed():
        return _same(reproduced)
    registered = cast("State[Registered]", register(root, return_state=True))
    if not registered.is_completed():
        return _same(registered)
    version = registered.result()
    promoted = cast("State[Promotion]", promote(root, version.version, return_state=True))
    if not promoted.is_completed():
        return _same(promoted)
    promotion = promoted.result()

    name = "Unchanged" if promotion.promoted and not promotion.changed else (promoted.name or "")
    champion = find_champion(workspace)
    report = "\n\n".join(
        [
            _verdict(name, version.name, promotion),
            *([headline(workspace, champion)] if champion else []),
            "Stages:\n\n" + table(reproduced.result()),
        ]
    )
    create_markdown_artifact(key="retrain", markdown=report, description="What was computed, and what serves now")
    if champion is None:
        return Failed(name="Refused", message="Nothing serves: " + "; ".join(promotion.reasons))
    return Completed(name=name, message=f"version {champion['version']} of {version.name} serves", data=report)


@task(cache_policy=NO_CACHE, task_run_name="register", persist_result=False)
def register(root: Path) -> "State[Registered]":
    """Make the weights on disk a version of the registered model, or find the one they have."""
    from darkroom.registry.promotion import register

    return _expected(
        lambda: register(Workspace(root)),
        lambda found: Completed(
            name="Registered" if found.created else "Known",
            message=f"version {found.version} of {found.name}",
            data=found,
        ),
    )


@task(cache_policy=NO_CACHE, task_run_name="promote", persist_result=False)
def promote(root: Path, version: str) -> "State[Promotion]":
    """Let a version serve if it passes the gate; the state is called Promoted or Kept."""
    from darkroom.registry.promotion import promote

    return _expected(
        lambda: promote(Workspace(root), version),
        lambda ended: Completed(
            name="Promoted" if ended.promoted else "Kept",
            message="; ".join(ended.reasons) or f"version {ended.version} passed the gate",
            data=ended,
        ),
    )


def _expected(work: Callable[[], T], done: Callable[[T], State[T]]) -> State[T]:
    """Errors that say all in one line become states; the others keep their traceback."""
    from darkroom.registry.tracking import RegistryUnavailable

    try:
        return done(work())
    except InputError as error:
        return Failed(name="BadInput", message=str(error), data=error)
    except RegistryUnavailable as error:
        return Failed(name="Unavailable", message=f"{error}; nothing is lost, the same command carries on", data=error)
    except StageFailed as error:
        return Failed(message=str(error), data=error)


def _same(state: State[Any]) -> State[str]:
    return Failed(name=state.name, message=state.message)


def _verdict(name: str, model: str, promotion: "Promotion") -> str:
    if name == "Promoted":
        before = f"; before: version {promotion.previous}" if promotion.previous else ""
        return f"Promoted: version {promotion.version} of {model} passed the gate and serves now{before}."
    if name == "Unchanged":
        return f"Unchanged: version {promotion.version} of {model} serves already."
    reasons = "\n".join(f"- {reason}" for reason in promotion.reasons)
    stays = f"version {promotion.previous} stays" if promotion.previous else "nothing serves"
    return f"Kept: version {promotion.version} of {model} was refused, {stays}:\n\n{reasons}"


def _run(workspace: Workspace, force: bool) -> State[Any]:
    state = cast("State[str]", retrain(workspace.root, force, return_state=True))
    if state.is_completed():
        print("", state.result().replace("**", ""), directions(workspace), sep="\n\n", flush=True)
    return state


def main(arguments: list[str]) -> int:
    """Run the flow for the project that holds the working directory; the exit code says how it ended."""
    return command("flows.retrain", "Make a model and let it serve if it is good enough.", _run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
