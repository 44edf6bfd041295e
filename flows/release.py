"""The tasks that make a model a version and let it serve, each a command of the checkout that made the model."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.darkroom_command import answer
from flows.failures import EXPECTED, failed, if_unavailable
from flows.limits import gpu_slot

DELAYS = (5, 15, 30, 60, 90, 90)  # seconds before MLflow is asked again; a restart of its server is bridged


@dataclass(frozen=True)
class Registered:
    """A model version; `champion` is what served when it was registered, as `darkroom status` describes it."""

    name: str
    version: str
    created: bool
    run_id: str
    champion: dict[str, Any] | None = None


@dataclass(frozen=True)
class Promotion:
    """How a promotion ended. `promoted`: `version` serves now; `changed`: it did not before."""

    promoted: bool
    changed: bool
    version: str
    previous: str | None  # the version that served before
    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)
    relation: str | None = None


@task(
    cache_policy=NO_CACHE,
    task_run_name="register",
    persist_result=False,
    retries=len(DELAYS),
    retry_delay_seconds=list(DELAYS),
    retry_condition_fn=if_unavailable,
)
def register(root: Path) -> "State[Registered]":
    """Make the weights of the project at `root` a version, or find the one they have: Registered or Known."""
    log = get_run_logger().info
    try:
        with ThreadPoolExecutor(1) as beside:  # what serves is asked meanwhile: each takes MLflow's import
            asked = beside.submit(_champion, root)
            made = answer(root, "register", log=log)
    except EXPECTED as error:
        return failed(error)
    registered = Registered(made["name"], made["version"], made["created"], made["run_id"], asked.result())
    name = "Registered" if registered.created else "Known"
    return Completed(name=name, message=f"version {registered.version} of {registered.name}", data=registered)


@task(
    cache_policy=NO_CACHE,
    task_run_name="promote",
    persist_result=False,
    retries=len(DELAYS),
    retry_delay_seconds=list(DELAYS),
    retry_condition_fn=if_unavailable,
)
def promote(root: Path, registered: Registered) -> "State[Promotion]":
    """Let a version serve if it passes the gate: Promoted, Kept, or Unchanged if it serves already."""
    if (registered.champion or {}).get("version") == registered.version:
        serves = f"version {registered.version} serves already"
        same = Promotion(True, False, registered.version, registered.version, [serves])
        return Completed(name="Unchanged", message=serves, data=same)
    refused = 1
    try:
        with gpu_slot():
            log, version = get_run_logger().info, registered.version
            found = answer(root, "promote", "--version", version, log=log, ok=(0, refused))
        known = {field.name for field in fields(Promotion)}  # of another commit's command there may be more
        ended = Promotion(**{name: value for name, value in found.items() if name in known})
    except EXPECTED as error:
        return failed(error)
    name = "Kept" if not ended.promoted else "Promoted" if ended.changed else "Unchanged"
    message = "; ".join(ended.reasons) or f"version {ended.version} passed the gate"
    return Completed(name=name, message=message, data=ended)


def _champion(root: Path) -> dict[str, Any] | None:
    """What serves; None also where that cannot be told, which the promotion itself will say."""
    try:
        champion: dict[str, Any] | None = answer(root, "status", log=lambda line: None)["champion"]
    except EXPECTED:
        return None
    return champion
