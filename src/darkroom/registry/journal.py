"""The history of decisions: one MLflow run each, in an experiment of its own, never changed once it is closed."""

import getpass
import json
import os
import socket
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from darkroom.files import digest_json
from darkroom.registry.aliases import Aliases
from darkroom.registry.runs import ensure_experiment
from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PROMOTED, FORCED, ROLLED_BACK, MOVED = "promoted", "forced", "rolled back", "moved by hand"
REFUSED, FAILED, INTERRUPTED, OPEN = "refused", "failed", "interrupted", "unfinished"
SERVED = (PROMOTED, FORCED, ROLLED_BACK, MOVED)

EDITED, DELETED = "edited by hand", "deleted by hand"

_PREFIX = "darkroom."
_FIRST = "none"  # what the first entry follows
_SEAL, _NOTE = "darkroom.seal", "darkroom.note"
_MAX_FINDINGS, _MAX_FINDING, _MAX_REASON = 12, 300, 4000  # what fits into a tag


@dataclass(frozen=True)
class Plan:
    """What a decision is about to do, written down before it does it: all that is needed to finish it or to undo it."""

    outcome: str  # promoted, forced, rolled back, refused or moved by hand; failed if the proof fails
    version_from: str | None  # the version that serves; None: none
    version_to: str | None
    previous: str | None  # what @previous is to be
    before: Aliases
    reason: str = ""  # a person's
    findings: list[str] = field(default_factory=list)  # the gate's, or what was found
    relation: str | None = None  # to the version that serves: first, better, tied, worse; None: not compared
    protocol: str | None = None  # digest
    weights_from: str | None = None  # digest
    weights_to: str | None = None
    git_commit: str | None = None  # of the project that decided


@dataclass(frozen=True)
class Decision:
    """One line of the history.

    `outcome`: promoted, forced, rolled back, refused, failed, interrupted, moved by hand, or unfinished: under way, or
    to be settled by the next command that changes the registry.
    """

    when: str  # UTC, ISO 8601
    who: str
    outcome: str
    version_from: str | None
    version_to: str | None  # None: nothing serves any more
    reason: str  # a person's, empty if none was given
    findings: list[str]  # the gate's, what failed, how it ended
    figures: dict[str, float]
    relation: str | None = None  # of version_to to version_from: first, better, tied, worse
    protocol: str | None = None  # digest
    weights_from: str | None = None  # digest
    weights_to: str | None = None
    git_commit: str | None = None  # of the project that decided
    host: str | None = None
    previous: str | None = None  # what @previous became
    run_id: str = ""
    remark: str | None = None  # "edited by hand" or "deleted by hand": the entry, after it was closed
    gone: list[str] = field(default_factory=list)  # those of the two versions that were deleted since
    torn: bool = False  # an entry that stood before this one is not there any more

    @property
    def route(self) -> str:
        """`1 -> 2`, with `none` and `(deleted)` where that is so."""
        return " -> ".join(self._named(version) for version in (self.version_from, self.version_to))

    def _named(self, version: str | None) -> str:
        return f"{version} (deleted)" if version in self.gone else version or "none"


@dataclass(frozen=True)
class Entry:
    """A decision that is being carried out: in the history from its start, so that a crash leaves a trace."""

    client: "MlflowClient"
    run_id: str
    when: str
    plan: Plan

    def judged(self, outcome: str, findings: list[str], relation: str | None, figures: dict[str, float]) -> "Entry":
        """Write down the verdict, before anything is done because of it."""
        plan = replace(self.plan, outcome=outcome, findings=findings, relation=relation)
        _write(self.client, self.run_id, _plan_tags(plan), figures)
        return replace(self, plan=plan)

    def close(self, outcome: str | None = None, note: str | None = None) -> None:
        """End it, as intended or with another outcome, and seal it: what is changed later shows."""
        tags = {"outcome": outcome, "note": note and note[:_MAX_FINDING]}
        _write(self.client, self.run_id, {key: value for key, value in tags.items() if value is not None}, {})
        _write(self.client, self.run_id, {"seal": _seal(self.client.get_run(self.run_id))}, {})
        self.client.set_terminated(self.run_id, status="FAILED" if outcome == FAILED else "FINISHED")


def experiment(name: str) -> str:
    """The experiment that holds the history of a registered model."""
    return f"{name}-promotions"


def begin(client: "MlflowClient", workspace: Workspace, name: str, plan: Plan, figures: dict[str, float]) -> Entry:
    """Write down what is about to be done, after all that is in the history, whatever the clocks of other hosts say."""
    experiment_id = ensure_experiment(client, workspace, experiment(name))
    last = _runs(client, name, deleted=True)[-1:]
    follows = last[0].info.run_id if last else _FIRST
    tags = {"who": user_name(), "host": socket.gethostname(), "follows": follows} | _plan_tags(plan)
    run = client.create_run(
        experiment_id,
        start_time=max([_now(), *(run.info.start_time + 1 for run in last)]),
        tags={_PREFIX + key: value for key, value in tags.items()},
        run_name=f"{plan.outcome}-{plan.version_to or 'none'}",
    )
    _write(client, run.info.run_id, {}, figures)
    return Entry(client, run.info.run_id, _when(run), plan)


def unfinished(client: "MlflowClient", name: str) -> list[Entry]:
    """Entries that were not closed, the oldest first: under the registry's lock, those of commands that died."""
    runs = _runs(client, name, deleted=False)
    return [Entry(client, run.info.run_id, _when(run), _read_plan(run)) for run in runs if _is_open(run)]


def history(workspace: Workspace) -> list[Decision]:
    """Every decision, the oldest first."""
    client = connect(workspace)
    with unavailable_is_one_line(tracking_uri(workspace)):
        return decisions(client, workspace.params().registry.name)


def decisions(client: "MlflowClient", name: str) -> list[Decision]:
    """Every decision about a registered model, the oldest first; those whose run was deleted by hand as well."""
    runs = _runs(client, name, deleted=True)
    if not runs:
        return []
    there = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}
    known = {run.info.run_id for run in runs} | {_FIRST}
    return [_decision(run, there, known) for run in runs]


def served(history: list[Decision]) -> str | None:
    """The version that serves by the history."""
    return next((entry.version_to for entry in reversed(history) if entry.outcome in SERVED), None)


def served_previously(history: list[Decision]) -> str | None:
    """The version that `@previous` is by the history."""
    return next((entry.previous for entry in reversed(history) if entry.outcome in SERVED), None)


def served_before(history: list[Decision], version: str) -> str | None:
    """The version that served when `version` was last made champion by a promotion."""
    came_from = [
        entry.version_from for entry in history if entry.version_to == version and entry.outcome in (PROMOTED, FORCED)
    ]
    return came_from[-1] if came_from else None


def _runs(client: "MlflowClient", name: str, deleted: bool) -> list["Run"]:
    from mlflow.entities import ViewType

    found = client.get_experiment_by_name(experiment(name))
    if found is None:
        return []
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [found.experiment_id],
            run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs += list(page)
        token = page.token
        if not token:
            return runs


def _decision(run: "Run", there: set[str], known: set[str]) -> Decision:
    plan, tags = _read_plan(run), run.data.tags
    edited = _SEAL in tags and tags[_SEAL] != _seal(run)
    return Decision(
        when=_when(run),
        who=tags.get(f"{_PREFIX}who", ""),
        outcome=OPEN if _is_open(run) else plan.outcome,
        version_from=plan.version_from,
        version_to=plan.version_to,
        reason=plan.reason,
        findings=[*plan.findings, *([tags[_NOTE]] if tags.get(_NOTE) else [])],
        figures=dict(run.data.metrics),
        relation=plan.relation,
        protocol=plan.protocol,
        weights_from=plan.weights_from,
        weights_to=plan.weights_to,
        git_commit=plan.git_commit,
        host=tags.get(f"{_PREFIX}host"),
        previous=plan.previous,
        run_id=run.info.run_id,
        remark=DELETED if run.info.lifecycle_stage == "deleted" else EDITED if edited else None,
        gone=[version for version in (plan.version_from, plan.version_to) if version and version not in there],
        torn=tags.get(f"{_PREFIX}follows", _FIRST) not in known,
    )


def _is_open(run: "Run") -> bool:
    return bool(run.info.status == "RUNNING")


def _when(run: "Run") -> str:
    return datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds")


_OPTIONAL = ("relation", "protocol", "weights_from", "weights_to", "git_commit", "previous")
_ALIASES = ("champion", "previous", "challenger")


def _plan_tags(plan: Plan) -> dict[str, str]:
    tags = {key: getattr(plan, key) or "" for key in _OPTIONAL}
    tags |= {f"before.{alias}": getattr(plan.before, alias) or "" for alias in _ALIASES}
    return tags | {
        "outcome": plan.outcome,
        "from": plan.version_from or "",
        "to": plan.version_to or "",
        "reason": plan.reason[:_MAX_REASON],
        "findings": findings_text(plan.findings),
    }


def _read_plan(run: "Run") -> Plan:
    """What the tags say; what somebody removed is missing, and what an older version did not write."""
    tags = {key.removeprefix(_PREFIX): value for key, value in run.data.tags.items()}
    try:
        findings = [str(finding) for finding in json.loads(tags.get("findings", "[]"))]
    except (ValueError, TypeError):
        findings = [tags["findings"]]
    return Plan(
        outcome=tags.get("outcome", ""),
        version_from=tags.get("from") or None,
        version_to=tags.get("to") or None,
        before=Aliases(**{alias: tags.get(f"before.{alias}") or None for alias in _ALIASES}),
        reason=tags.get("reason", ""),
        findings=findings,
        **{key: tags.get(key) or None for key in _OPTIONAL},
    )


def findings_text(findings: list[str]) -> str:
    """JSON that fits into a tag."""
    return json.dumps([finding[:_MAX_FINDING] for finding in findings[:_MAX_FINDINGS]])


def _write(client: "MlflowClient", run_id: str, tags: dict[str, str], figures: dict[str, float]) -> None:
    from mlflow.entities import Metric, RunTag

    if not tags and not figures:
        return
    metrics = [Metric(key, value, _now(), 0) for key, value in sorted(figures.items())]
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(_PREFIX + key, value) for key, value in tags.items()])


def _now() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


def _seal(run: "Run") -> str:
    """Digest of all that a closed entry says."""
    tags = {key: value for key, value in run.data.tags.items() if key.startswith(_PREFIX) and key != _SEAL}
    figures = {key: repr(value) for key, value in run.data.metrics.items()}
    return digest_json({"run": run.info.run_id, "start": run.info.start_time, "tags": tags, "figures": figures})


def user_name() -> str:
    """The user's name, or the number where a container has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
