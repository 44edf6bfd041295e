"""The MLflow side of a training: where runs are kept, and a log that never makes a training wait or fail.

`TrainingLog` is a convenience while a training runs; the record is `reports/train/` on disk, from which
`darkroom register` completes the run. That is why everything here may give up, and nothing here may stop a training.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel

from darkroom.errors import InputError, StageFailed
from darkroom.params import Params
from darkroom.registry.tracking import (
    RegistryUnavailable,
    artifact_root,
    connect,
    first_line,
    import_mlflow,
    shown,
    tracking_uri,
    without_password,
)
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

FINGERPRINT_TAG = "darkroom.fingerprint"
PRECISION_TAG = "darkroom.precision"  # that the training was computed in; the parameter says what was asked for

_BATCH = 1000  # metrics per request, MLflow's limit
_CLOSE_SECONDS = 8.0  # that a finished training waits for its last points to arrive
_RETRY_SECONDS = 30.0  # between attempts while a server does not answer

_logger = logging.getLogger(__name__)


def ensure_experiment(client: "MlflowClient", workspace: Workspace, name: str) -> str:
    """The id of the experiment `name`, created on first use. Raises InputError if it was deleted."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_root(workspace)))
        except MlflowException as error:  # another process may have been first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise RegistryUnavailable(f"MLflow experiment {name!r}: {first_line(error)}") from error
    if experiment.lifecycle_stage != "active":
        identity = experiment.experiment_id
        raise InputError(
            f"MLflow experiment {name!r} was deleted: `mlflow experiments restore -x {identity}` brings it back"
        )
    return str(experiment.experiment_id)


def find_run(client: "MlflowClient", experiment_id: str, fingerprint: str) -> str | None:
    """The id of the run of this training, the oldest if there are several."""
    query = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
    runs = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
    return str(runs[0].info.run_id) if runs else None


def ensure_run(
    client: "MlflowClient",
    workspace: Workspace,
    params: Params,
    fingerprint: str,
    tags: dict[str, str],
) -> str:
    """The id of the run of this training, found by its fingerprint or created with `tags`, with its params."""
    experiment_id = ensure_experiment(client, workspace, params.registry.name)
    run_id = find_run(client, experiment_id, fingerprint)
    if run_id is None:
        created = client.create_run(
            experiment_id,
            tags={**tags, FINGERPRINT_TAG: fingerprint},
            run_name=f"train-{fingerprint[:8]}",
        )
        run_id = str(created.info.run_id)
    _write_params(client, run_id, {"data": params.data, "train": params.train})
    return run_id


def _write_params(client: "MlflowClient", run_id: str, groups: dict[str, BaseModel]) -> None:
    """Log the parameters that the run does not have yet: they are write-once."""
    from mlflow.entities import Param

    there = client.get_run(run_id).data.params
    flat = dict(pair for name, group in groups.items() for pair in _flatten(name, group.model_dump()))
    missing = [Param(key, value) for key, value in sorted(flat.items()) if key not in there]
    for start in range(0, len(missing), 100):  # MLflow's limit
        client.log_batch(run_id, params=missing[start : start + 100])


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}", inner)
    else:
        yield prefix, str(value)


def write_history(
    client: "MlflowClient",
    run_id: str,
    rows: Iterable[tuple[int, dict[str, float]]],
    known: dict[str, set[int]] | None = None,
) -> int:
    """Log rows, each a timestamp in milliseconds and a dict of "step" and metrics; return how many points were new.

    Points whose (metric, step) the run has are left out. `known` remembers them from one call to the next; after an
    error it must start empty again. What is sent twice with one timestamp is stored once.
    """
    from mlflow.entities import Metric

    known = {} if known is None else known
    batch: list[Metric] = []
    written = 0
    for timestamp, row in rows:
        step = int(row["step"])
        for key in sorted(row.keys() - {"step"}):
            if key not in known:
                known[key] = {metric.step for metric in client.get_metric_history(run_id, key)}
            if step not in known[key]:
                known[key].add(step)
                batch.append(Metric(key, float(row[key]), timestamp, step))
                written += 1
        if len(batch) > _BATCH - len(row):
            client.log_batch(run_id, metrics=batch)
            batch = []
    if batch:
        client.log_batch(run_id, metrics=batch)
    return written


class TrainingLog:
    """One training's MLflow run, written by a thread of its own: `log` never waits, `close` a bounded time.

    A server that does not answer costs one warning and is asked again from time to time; rows that never arrive are in
    `reports/train/` and get into the run at the next `darkroom register`.
    """

    def __init__(
        self,
        workspace: Workspace,
        fingerprint: str,
        params: Params,
        tags: dict[str, str],
    ) -> None:
        self._workspace, self._fingerprint, self._params, self._tags = (
            workspace,
            fingerprint,
            params,
            tags,
        )
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._lock = threading.Lock()
        self._pending: list[tuple[int, dict[str, float]]] = []  # (milliseconds, row)
        self._known: dict[str, set[int]] = {}  # the steps that the run has, by metric
        self._status: str | None = None
        self._last_tags: dict[str, str] = {}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow-log", daemon=True)

    @classmethod
    def open(
        cls,
        workspace: Workspace,
        fingerprint: str,
        params: Params,
        tags: dict[str, str],
    ) -> Self:
        """Start logging to the run with this fingerprint: a resumed training finds its run again. Never raises."""
        log = cls(workspace, fingerprint, params, tags)
        try:
            import_mlflow()  # not in the thread: imports that run side by side can see half-made modules
        except Exception as error:
            log._warn(error)
            return log
        log._wake.set()
        log._thread.start()
        return log

    def log(self, rows: list[dict[str, float]]) -> None:
        """Hand over rows, each with "step"; returns at once."""
        now = int(time.time() * 1000)
        with self._lock:
            self._pending += [(now, dict(row)) for row in rows]
        self._wake.set()

    def close(self, status: str, tags: dict[str, str] | None = None) -> None:
        """End the run as FINISHED, KILLED or FAILED, with `tags` more.

        Waits at most `_CLOSE_SECONDS` for what is still under way.
        """
        self._status, self._last_tags = status, tags or {}
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                self._warn(TimeoutError(f"no answer within {_CLOSE_SECONDS:.0f} s"))

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._flush()
                if closing:
                    self._terminate()
            except Exception as error:
                self._warn(error)
                if not closing:
                    self._closing.wait(_RETRY_SECONDS)
                    self._wake.set()
            if closing:
                return

    def _flush(self) -> None:
        client, run_id = self._open_run()
        with self._lock:
            rows = list(self._pending)
        try:
            write_history(client, run_id, rows, self._known)
        except Exception:
            self._known = {}
            raise
        with self._lock:
            del self._pending[: len(rows)]

    def _open_run(self) -> tuple[Any, str]:
        if self._client is None:
            self._client = connect(self._workspace)
        if self._run_id is None:
            run_id = ensure_run(
                self._client,
                self._workspace,
                self._params,
                self._fingerprint,
                self._tags,
            )
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
        return self._client, self._run_id

    def _terminate(self) -> None:
        if self._client is not None and self._run_id is not None and self._status is not None:
            for key, value in self._last_tags.items():
                self._client.set_tag(self._run_id, key, value)
            self._client.set_terminated(self._run_id, status=self._status)

    def _warn(self, error: BaseException) -> None:
        if self._warned:
            return
        self._warned = True
        uri = tracking_uri(self._workspace)
        reason = str(error)
        if not isinstance(error, StageFailed):
            reason = f"MLflow at {shown(uri)}: {without_password(first_line(error), uri)}"
        _logger.warning(
            "%s; training goes on, and `darkroom register` will complete the run from reports/train",
            reason,
        )
