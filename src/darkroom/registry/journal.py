"""The history of decisions: one MLflow run each, in an experiment of its own, never changed once it is closed."""

import getpass
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from darkroom.registry.runs import ensure_experiment
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVED = ("promoted", "forced", "rolled back")


@dataclass(frozen=True)
class Decision:
    """One line of the history. `outcome`: promoted, forced, rolled back, refused, failed or interrupted."""

    when: str  # UTC, ISO 8601
    who: str
    outcome: str
    version_from: str | None
    version_to: str
    reason: str  # a person's, empty if none was given
    findings: list[str]  # the gate's, or what failed
    figures: dict[str, float]


@dataclass
class Entry:
    """A decision that is being carried out: in the history from its start, so that a crash leaves a trace."""

    client: "MlflowClient"
    run_id: str

    def close(self, outcome: str | None = None, finding: str | None = None) -> None:
        """End it, as intended or with another outcome."""
        if outcome is not None:
            self.client.set_tag(self.run_id, "darkroom.outcome", outcome)
        if finding is not None:
            self.client.set_tag(self.run_id, "darkroom.findings", json.dumps([finding]))
        self.client.set_terminated(self.run_id, status="FAILED" if outcome == "failed" else "FINISHED")


def experiment(name: str) -> str:
    """The experiment that holds the history of a registered model."""
    return f"{name}-promotions"


def begin(
    client: "MlflowClient",
    workspace: Workspace,
    name: str,
    outcome: str,
    version_from: str | None,
    version_to: str,
    *,
    reason: str,
    findings: list[str],
    figures: dict[str, float],
) -> Entry:
    """Write a decision with the outcome that it will have unless something fails."""
    from mlflow.entities import Metric

    tags = {
        "darkroom.who": _who(),
        "darkroom.outcome": outcome,
        "darkroom.from": version_from or "",
        "darkroom.to": version_to,
        "darkroom.reason": reason[:4000],
        "darkroom.findings": json.dumps([finding[:500] for finding in findings[:12]]),
    }
    experiment_id = ensure_experiment(client, workspace, experiment(name))
    run = client.create_run(experiment_id, tags=tags, run_name=f"{outcome}-{version_to}")
    metrics = [Metric(key, value, run.info.start_time, 0) for key, value in sorted(figures.items())]
    client.log_batch(run.info.run_id, metrics=metrics)
    return Entry(client, run.info.run_id)


def decisions(client: "MlflowClient", name: str) -> list[Decision]:
    """Every decision about a registered model, the oldest first."""
    found = client.get_experiment_by_name(experiment(name))
    if found is None:
        return []
    runs, token = [], None
    while True:
        page = client.search_runs(
            [found.experiment_id], max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += list(page)
        token = page.token
        if not token:
            break
    history = []
    for run in runs:
        tags = run.data.tags
        when = datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds")
        history.append(
            Decision(
                when=when,
                who=tags["darkroom.who"],
                outcome=tags["darkroom.outcome"] if run.info.status != "RUNNING" else "interrupted",
                version_from=tags["darkroom.from"] or None,
                version_to=tags["darkroom.to"],
                reason=tags["darkroom.reason"],
                findings=json.loads(tags["darkroom.findings"]),
                figures=dict(run.data.metrics),
            )
        )
    return history


def served_before(history: list[Decision], version: str) -> str | None:
    """The version that served when `version` was last made champion by a promotion."""
    came_from = [entry.version_from for entry in history if entry.version_to == version and entry.outcome in SERVED[:2]]
    return came_from[-1] if came_from else None


def _who() -> str:
    """The user's name, or the number where a container has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
