"""Runs of a deployment that were started for one reason: how many there were, how they ended, and the next one.

The runs themselves are the memory: their idempotency keys count them, so that whoever asks at the same moment, on
whatever host, gets the same run and not a second one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from darkroom.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

BUSY = "Deployment concurrency limit reached."  # what the server says of a run that it cancels for that
DECIDED = ("BadInput", "Refused")  # ends that another run with the same data would have as well
_NOT_ITS_FAULT = ("Interrupted",)  # stopped from outside with its state saved
_MOST = 200  # runs that are read, the server's own limit


@dataclass(frozen=True)
class Attempts:
    """The runs for one key, in their order."""

    key: str
    runs: list[FlowRun]

    @property
    def last(self) -> FlowRun | None:
        """The latest one that the deployment was free for."""
        return next((run for run in reversed(self.runs) if not _was_cancelled_as_busy(run)), None)

    @property
    def failed(self) -> int:
        """How many ended without a result, for a reason of their own: failed, crashed, cancelled by a person."""
        ended = [run.state for run in self.runs if run.state and not _was_cancelled_as_busy(run)]
        return sum(s.is_final() and not s.is_completed() and s.name not in _NOT_ITS_FAULT for s in ended)

    @property
    def next_key(self) -> str:
        return f"{self.key}-{1 + max((_number(self.key, run) for run in self.runs), default=0)}"


def find_deployment(client: "SyncPrefectClient", name: str) -> "DeploymentResponse":
    """The deployment `flow/name`. Raises InputError if the server has none of that name."""
    try:
        return client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError):  # the second for what is no such name
        raise InputError(
            f"deployment {name!r}: the Prefect server has none; `python -m flows.deploy` makes those of prefect.yaml"
        ) from None


def attempts(client: "SyncPrefectClient", deployment: "DeploymentResponse", key: str, tag: str) -> Attempts:
    """The runs of `deployment` that were started with `key`; all of them have `tag`."""
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]), tags=FlowRunFilterTags(all_=[tag])
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=_MOST,
    )
    mine = [run for run in found if (run.idempotency_key or "").startswith(f"{key}-")]
    return Attempts(key, sorted(mine, key=lambda run: _number(key, run)))


def is_busy(deployment: "DeploymentResponse") -> bool:
    """Whether the deployment has as many runs under way as it may have, so that a new one would be cancelled."""
    limit = deployment.global_concurrency_limit
    return limit is not None and limit.active_slots >= limit.limit


def start(
    client: "SyncPrefectClient",
    deployment: "DeploymentResponse",
    before: Attempts,
    parameters: dict[str, Any],
    tags: list[str],
) -> FlowRun:
    """Start the run after those in `before`, or find the one that somebody has started in the meantime.

    Raises InputError if the deployment refuses the parameters.
    """
    try:
        return client.create_flow_run_from_deployment(
            deployment.id, parameters=parameters, tags=tags, idempotency_key=before.next_key
        )
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (400, 409, 422):
            raise
        reason = " ".join(error.response.text.split())
        raise InputError(f"deployment {deployment.name!r} refuses parameters {parameters}: {reason}") from None


def _was_cancelled_as_busy(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_cancelled() and run.state.message == BUSY


def _number(key: str, run: FlowRun) -> int:
    number = (run.idempotency_key or "").removeprefix(f"{key}-")
    return int(number) if number.isdecimal() else 0
