"""Which version serves: promotion behind the gate, as a transaction, with a history that is only ever added to."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import GatePolicy, Params
from darkroom.registry import journal, recovery
from darkroom.registry.aliases import CHALLENGER, CHAMPION, PREVIOUS, read_aliases, version_at
from darkroom.registry.best import best_champion
from darkroom.registry.gate import Evidence, decide
from darkroom.registry.journal import FORCED, PROMOTED, REFUSED, ROLLED_BACK, Decision, Entry, Plan, history
from darkroom.registry.lease import Lease
from darkroom.registry.lineage import git_tags, score_figures
from darkroom.registry.lock import leased
from darkroom.registry.proof import prove
from darkroom.registry.recovery import ROLLED_BACK_TAG, disagreements
from darkroom.registry.scoring import current_protocol, score_version
from darkroom.registry.tracking import connect, first_line, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import (
    PROTOCOL_TAG,
    VALIDATED_TAG,
    WEIGHTS_TAG,
    Registered,
    register,
    serves_otherwise,
    stored_score,
    version_numbered,
)
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "Decision",
    "Promotion",
    "Registered",
    "disagreements",
    "history",
    "promote",
    "register",
    "rollback",
    "status",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """How a promotion or a rollback ended. `promoted`: `version` serves now; `changed`: it did not before."""

    promoted: bool
    changed: bool
    version: str
    previous: str | None  # the version that served before
    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)
    relation: str | None = None  # to the version that served before: first, better, tied, worse; None: not compared


def promote(
    workspace: Workspace, version: str | int | None = None, reason: str | None = None, force: bool = False
) -> Promotion:
    """Let a version (default: `@challenger`) serve if it passes the gate. If it serves already, nothing happens.

    What speaks against it without loading it is enough for a refusal; otherwise it is loaded and drawn from in a clean
    process first. `force` passes over the gate's verdict, not over that proof, and needs a reason; both are recorded.
    Whatever happens, `@champion` is a version that was proven, and a command that dies is settled by the next.

    Raises InputError if there is no such version or nothing to compare by; StageFailed if the model does not work when
    loaded (the aliases are as before then) or another command changes the registry for too long; RegistryUnavailable if
    the server does not answer.
    """
    if force and not (reason or "").strip():
        raise InputError('an override needs a reason, which is recorded: --force --reason "..."')
    params = workspace.params()
    name = params.registry.name
    with leased(workspace) as held:
        client, lease = held.client, held.lease
        champion = version_at(client, name, CHAMPION)
        candidate = _candidate(client, name, version, champion)
        number, previous = str(candidate.version), None if champion is None else str(champion.version)
        if number == previous:
            return Promotion(True, False, number, previous, [f"version {number} is {CHAMPION} already"])
        case = _case(client, workspace, params, candidate, champion, force)
        reasons, relation = case.verdict(seconds_per_image=0.0)
        refused = bool(reasons) and not force
        plan = Plan(
            outcome=REFUSED if refused else FORCED if reasons else PROMOTED,
            version_from=previous,
            version_to=number,
            previous=previous,
            before=read_aliases(client, name),
            reason=reason or "",
            findings=reasons,
            relation=relation,
            protocol=case.protocol,
            weights_from=None if champion is None else champion.tags.get(WEIGHTS_TAG),
            weights_to=candidate.tags.get(WEIGHTS_TAG),
            git_commit=git_tags(workspace.root).get("darkroom.git_commit"),
        )
        figures = case.figures()
        entry = journal.begin(client, workspace, name, plan, figures)
        if refused:
            recovery.finish(client, name, entry)
            return Promotion(False, False, number, previous, reasons, figures, relation)
        with _as_before_on_failure(client, lease, name, entry):
            proof = prove(workspace, candidate, params.registry.gate.max_seconds_per_image)
            reasons, relation = case.verdict(proof.seconds_per_image)
            outcome = PROMOTED if not reasons else FORCED if force else REFUSED
            seen = {"seconds_per_image": proof.seconds_per_image}
            lease.verify()
            recovery.finish(client, name, entry.judged(outcome, reasons, relation, seen))
        done = outcome != REFUSED
        return Promotion(done, done, number, previous, reasons, figures | seen, relation)


def rollback(workspace: Workspace, reason: str) -> Promotion:
    """Let `@previous` serve again. The version that served is marked, so that only an override promotes it again.

    If an earlier rollback was interrupted where it had to be completed, that is all that is done: the same command
    twice rolls back once. Raises what `promote` raises.
    """
    if not reason.strip():
        raise InputError('a rollback needs a reason, which is recorded: --reason "..."')
    params = workspace.params()
    name = params.registry.name
    with leased(workspace) as held:
        client, lease = held.client, held.lease
        for done in held.completed:
            if done.plan.outcome == ROLLED_BACK and done.plan.version_to:
                return Promotion(True, True, done.plan.version_to, done.plan.version_from, [done.plan.reason])
        champion, target = version_at(client, name, CHAMPION), version_at(client, name, PREVIOUS)
        told = journal.decisions(client, name)
        if champion is None or target is None:
            raise InputError(_nothing_to_roll_back_to(name, told, CHAMPION if champion is None else PREVIOUS))
        left, back = str(champion.version), str(target.version)
        before = journal.served_before(told, back)
        plan = Plan(
            outcome=ROLLED_BACK,
            version_from=left,
            version_to=back,
            previous=None if before in (left, back) else before,
            before=read_aliases(client, name),
            reason=reason,
            weights_from=champion.tags.get(WEIGHTS_TAG),
            weights_to=target.tags.get(WEIGHTS_TAG),
            git_commit=git_tags(workspace.root).get("darkroom.git_commit"),
        )
        entry = journal.begin(client, workspace, name, plan, {})
        with _as_before_on_failure(client, lease, name, entry):
            prove(workspace, target, params.registry.gate.max_seconds_per_image)
            lease.verify()
            recovery.finish(client, name, entry)
        return Promotion(True, True, back, left, [reason])


def status(workspace: Workspace) -> dict[str, dict[str, Any] | None]:
    """What `@champion`, `@challenger` and `@previous` are: version, weights, commit, protocol and figures."""
    client = connect(workspace)
    name = workspace.params().registry.name
    with unavailable_is_one_line(tracking_uri(workspace)):
        return {alias: _summary(version_at(client, name, alias)) for alias in (CHAMPION, CHALLENGER, PREVIOUS)}


def _summary(version: "ModelVersion | None") -> dict[str, Any] | None:
    if version is None:
        return None
    record = stored_score(version, version.tags.get(PROTOCOL_TAG, ""))
    return {
        "version": str(version.version),
        "weights": version.tags.get(WEIGHTS_TAG),
        "protocol": version.tags.get(PROTOCOL_TAG),
        "git_commit": version.tags.get("darkroom.git_commit"),
        "run_id": version.run_id,
        "figures": score_figures(record) if record else {},
    }


@dataclass(frozen=True)
class _Case:
    """All that is known about a candidate before it is loaded."""

    policy: GatePolicy
    objections: list[str]  # beside the gate's
    challenger: ScoreRecord | None  # None: not comparable, which is among the objections
    champion: ScoreRecord | None
    best: ScoreRecord | None  # of the champions so far, if that is another one
    validated: bool

    @property
    def protocol(self) -> str | None:
        return None if self.challenger is None else self.challenger.protocol_digest

    def verdict(self, seconds_per_image: float) -> tuple[list[str], str | None]:
        """What stands against the candidate, and how it relates to the champion."""
        if self.challenger is None:
            return self.objections, None
        evidence = Evidence(validated=self.validated, seconds_per_image=seconds_per_image)
        verdict = decide(self.policy, self.challenger, self.champion, evidence, self.best)
        return self.objections + verdict.reasons, verdict.relation

    def figures(self) -> dict[str, float]:
        """The figures of each, by `challenger.`, `champion.` or `best.` and their names."""
        records = {"challenger": self.challenger, "champion": self.champion, "best": self.best}
        return {
            f"{who}.{key}": value
            for who, record in records.items()
            if record is not None
            for key, value in score_figures(record).items()
        }


def _case(
    client: "MlflowClient",
    workspace: Workspace,
    params: Params,
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    force: bool,
) -> _Case:
    """Bring together what is known; the scores that are missing are made first."""
    objections = []
    if mark := candidate.tags.get(ROLLED_BACK_TAG):
        objections.append(f"version {candidate.version} was rolled back at {mark}")
    challenger = served = best = None
    try:
        protocol = current_protocol(workspace, candidate)
        challenger = score_version(client, workspace, params, candidate, protocol)
        if champion is not None:
            served = score_version(client, workspace, params, champion, protocol)
        if not force:  # whose verdict does not count: nothing is measured for it
            best = best_champion(client, workspace, params, candidate, protocol, served)
    except InputError as error:
        if not force:
            raise
        challenger = served = best = None
        objections.append(f"not comparable: {error}")
    if challenger and (differences := serves_otherwise(candidate, challenger)):
        objections.append(f"version {candidate.version} draws by default with {'; '.join(differences)}")
    validated = candidate.tags.get(VALIDATED_TAG) == "true"
    return _Case(params.registry.gate, objections, challenger, served, best, validated)


def _candidate(
    client: "MlflowClient", name: str, version: str | int | None, champion: "ModelVersion | None"
) -> "ModelVersion":
    if version is not None:
        return version_numbered(client, name, str(version))
    candidate = version_at(client, name, CHALLENGER) or champion
    if candidate is None:
        raise InputError(f"model {name!r} has no @{CHALLENGER}: `darkroom register` makes one")
    return candidate


def _nothing_to_roll_back_to(name: str, told: list[Decision], missing: str) -> str:
    made = [entry for entry in told if entry.outcome in (PROMOTED, FORCED, ROLLED_BACK)]
    last = made[-1] if made else None
    lost = last and (last.version_to if missing == CHAMPION else last.previous)
    deleted = f" (version {lost} was deleted)" if any(lost in entry.gone for entry in told) else ""
    return f"model {name!r} has no @{missing}{deleted}: there is nothing to roll back to"


@contextlib.contextmanager
def _as_before_on_failure(client: "MlflowClient", lease: Lease, name: str, entry: Entry) -> Iterator[None]:
    """Put the aliases back and close the entry as failed if the block raises.

    Where that fails as well, or the lease is lost, the entry stays open: the next command settles it.
    """
    try:
        yield
    except BaseException as error:
        try:
            if lease.is_ours():
                recovery.undo(client, name, entry)
                entry.close(journal.FAILED, str(error) or type(error).__name__)
        except Exception as failure:
            _logger.debug("left to the next command: %s", first_line(failure))
        raise
