"""Task runs as Prefect's server knows them, once it knows all of them."""

import time

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TaskRun


def settled_task_runs(client: SyncPrefectClient, of: FlowRunFilter, seconds: float = 150) -> list[TaskRun]:
    """The task runs of a flow run that has ended, when all of them have.

    States of tasks reach the server as events, which it stores with a delay: a minute, where SQLite is busy.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = client.read_task_runs(flow_run_filter=of)
        if all(run.state and run.state.is_final() for run in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
