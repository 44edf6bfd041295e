"""The MLflow run of one combination of a sweep: its parameters and figures, below the run of its training.

Combinations that differ in how images are drawn share a training, and so its run with the curves; what each of them
scored is in a run of its own, so that MLflow can compare them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from darkroom.files import digest_json, read_json
from darkroom.registry.lineage import SCORES
from darkroom.workspace import Workspace
from flows.failures import EXPECTED, failed, if_unavailable
from flows.release import DELAYS

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT_TAG = "darkroom.experiment"
_IDENTITY_TAG = "darkroom.trial"


@task(
    cache_policy=NO_CACHE,
    task_run_name="log {name}",
    persist_result=False,
    retries=len(DELAYS),
    retry_delay_seconds=list(DELAYS),
    retry_condition_fn=if_unavailable,
)
def log_run(root: Path, combination: dict[str, Any], name: str, record: dict[str, Any]) -> "State[str]":
    """Make the run of experiment `name`, or find it; the result is its id.

    A server that does not answer in the end is no reason to stop a sweep: the same sweep again makes what is missing.
    """
    from darkroom.registry.runs import ensure_experiment, find_run
    from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line

    workspace = Workspace(root)
    try:
        client = connect(workspace)
        with unavailable_is_one_line(tracking_uri(workspace)):
            experiment_id = ensure_experiment(client, workspace, workspace.params().registry.name)
            training = find_run(client, experiment_id, read_json(workspace.models / "run.json")["fingerprint"])
            run_id = _ensure(client, experiment_id, training, combination, name, record)
    except EXPECTED as error:
        return failed(error)
    return Completed(message=run_id, data=run_id)


def _ensure(
    client: "MlflowClient",
    experiment_id: str,
    training: str | None,
    combination: dict[str, Any],
    name: str,
    record: dict[str, Any],
) -> str:
    from mlflow.entities import Metric, Param

    identity = digest_json([name, record["weights_digest"], record["protocol_digest"]])
    query = f"tags.`{_IDENTITY_TAG}` = '{identity}' and attributes.status = 'FINISHED'"
    if found := client.search_runs([experiment_id], query, max_results=1):
        return str(found[0].info.run_id)
    parent = {"mlflow.parentRunId": training} if training else {}
    tags = {EXPERIMENT_TAG: name, _IDENTITY_TAG: identity, **parent}
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    params = [Param(key, str(value)) for key, value in combination.items()]
    metrics = [Metric(key, value, 0, 0) for key, value in figures(record).items()]
    client.log_batch(run_id, metrics=metrics, params=params)
    client.set_terminated(run_id)
    return run_id


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a score record, by the names that the registry gives them: unguided.fid and so on."""
    found: dict[str, float] = {}
    for name in ("unguided", "guided"):
        for key in SCORES:
            if estimate := record[name].get(key):
                found[f"{name}.{key}"] = estimate["value"]
                if estimate["spread"] is not None:
                    found[f"{name}.{key}_spread"] = estimate["spread"]
    return found
