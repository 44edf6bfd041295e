"""The tasks that bring to a retraining what it needs and take away what it made: raw data, outputs, its record."""

from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from darkroom.errors import StageFailed
from darkroom.files import read_json
from darkroom.workspace import Workspace
from flows import raw_data
from flows.artifacts import human_size
from flows.dvc_stage import dvc
from flows.failures import EXPECTED, failed
from flows.preflight import default_remote
from flows.record import branch_of, is_changed, push_record
from flows.settings import Settings

SYNC_DELAYS = (10, 60, 180)  # seconds before a bucket that does not answer is asked again
PUSH_DELAYS = (10, 30, 90)  # seconds before a push to a remote is tried again


@task(
    cache_policy=NO_CACHE,
    task_run_name="sync",
    persist_result=False,
    retries=len(SYNC_DELAYS),
    retry_delay_seconds=list(SYNC_DELAYS),
    retry_condition_fn=lambda task, run, state: state.name == "Failed",
)
def sync(root: Path) -> "State[Any]":
    """Bring the raw data of a workspace up to date, if it comes from S3 or is tracked by DVC."""
    try:
        synced = raw_data.sync(Settings.from_environment(), root, get_run_logger().info)
    except EXPECTED as error:
        return failed(error)
    if synced is None:
        return Completed(message="the source is not on S3")
    changes = f"{synced.new} new, {synced.changed} changed, {synced.removed} removed"
    return Completed(message=f"{synced.files} files, {human_size(synced.bytes)}: {changes}", data=synced)


@task(cache_policy=NO_CACHE, task_run_name="restore", persist_result=False)
def restore(root: Path) -> "State[Any]":
    """Bring the outputs that `dvc.lock` names from cache or remote, so that an unchanged stage has nothing to do.

    What is nowhere is computed by its stage: of stages that the lock says are up to date DVC asks no run cache.
    """
    verb = "pull" if default_remote(root) else "checkout"
    try:
        if (root / "dvc.lock").is_file():
            dvc(root, verb, "--quiet", "--allow-missing", log=get_run_logger().info)
    except StageFailed as error:
        return Completed(name="Incomplete", message=str(error))
    return Completed()


@task(
    cache_policy=NO_CACHE,
    task_run_name="push",
    persist_result=False,
    retries=len(PUSH_DELAYS),
    retry_delay_seconds=list(PUSH_DELAYS),
)
def push(root: Path) -> "State[Any]":
    """Push outputs and run cache to the DVC remote. After the last attempt it is a warning: what serves, serves."""
    logger = get_run_logger()
    try:
        dvc(root, "push", "--run-cache", "--quiet", log=logger.info)
    except StageFailed as error:
        if _is_tried_again(push.retries):
            return Failed(name="NotPushed", message=str(error))
        logger.warning("Outputs are in this machine's cache alone: %s; `dvc push --run-cache` repeats it", error)
        return Completed(name="NotPushed", message=str(error))
    return Completed(name="Pushed")


def _is_tried_again(retries: int) -> bool:
    """Whether Prefect would run the current task again."""
    from prefect.runtime import task_run

    return bool((task_run.run_count or 1) <= retries)


@task(cache_policy=NO_CACHE, task_run_name="record", persist_result=False)
def record(root: Path, summary: str) -> "State[str]":
    """Push lock and parameters to a branch of the repository; Recorded, Unchanged, or NotRecorded with a warning."""
    logger = get_run_logger()
    settings, branch = Settings.from_environment(), branch_of(root.name)
    try:
        if not is_changed(root):
            return Completed(name="Unchanged", message="lock and parameters are those of the commit")
        message = f"retrain: {summary}\n\nRun: {flow_run.name}\nData: {_data_digest(root)}\n"
        commit = push_record(settings, root, branch, message)
    except StageFailed as error:
        logger.warning("Lock and parameters are in MLflow alone, %s was not pushed: %s", branch, error)
        return Completed(name="NotRecorded", message=str(error))
    return Completed(name="Recorded", message=f"{branch}, commit {commit[:8]}", data=branch)


def _data_digest(root: Path) -> str:
    try:
        return str(read_json(Workspace(root).prepared / "dataset.json")["digest"])
    except (OSError, ValueError, KeyError):
        return "unknown"
