"""What earlier commands and people left behind, settled before a new command begins: the history never lies.

A command that died left an open entry in the journal. If `@champion` is where that entry wanted it, the promotion took
place and is finished; if not, it is undone. Both can be repeated: a recovery that dies is taken up by the next.
"""

import logging
from typing import TYPE_CHECKING

from darkroom.registry import journal
from darkroom.registry.aliases import CHALLENGER, CHAMPION, NOT_THERE, PREVIOUS, Aliases, point, read_aliases, serve
from darkroom.registry.journal import FORCED, MOVED, OPEN, PROMOTED, REFUSED, ROLLED_BACK, Decision, Entry, Plan
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROLLED_BACK_TAG = "darkroom.rolled_back"

_MOVES = (PROMOTED, FORCED, ROLLED_BACK)

_logger = logging.getLogger(__name__)


def settle(client: "MlflowClient", workspace: Workspace, name: str) -> list[Entry]:
    """Finish or undo what was interrupted, record what was moved by hand, and return what was finished.

    To be called under the registry's lock: an open entry is then that of a command that died.
    """
    finished = []
    for entry in journal.unfinished(client, name):
        plan = entry.plan
        what = f"an earlier command ({plan.outcome}, {plan.version_from or 'none'} -> {plan.version_to or 'none'})"
        if plan.outcome in (journal.FAILED, journal.INTERRUPTED):  # it died as it was being closed
            entry.close(plan.outcome)
        elif plan.outcome in _MOVES and read_aliases(client, name).champion != plan.version_to:
            undo(client, name, entry)
            entry.close(journal.INTERRUPTED, "ended before it was done; the aliases are as before")
            _logger.warning("%s was interrupted; what it had begun is undone", what)
        else:
            finish(client, name, entry, "completed after an interruption")
            finished.append(entry)
            _logger.warning("%s was interrupted; it is completed now", what)
    _record_moves(client, workspace, name)
    return finished


def finish(client: "MlflowClient", name: str, entry: Entry, note: str | None = None) -> None:
    """What a decision leads to: aliases, marks and verdict on the versions, the entry closed. Can be repeated."""
    plan, there = entry.plan, _versions(client, name)
    if plan.outcome in _MOVES:
        serve(client, name, plan.version_to, plan.previous if plan.previous in there else None)
        if read_aliases(client, name).challenger == plan.version_to:
            point(client, name, CHALLENGER, None)
    if plan.outcome == ROLLED_BACK:
        _tag(client, name, plan.version_from, {ROLLED_BACK_TAG: _mark(entry)})
    if plan.outcome in (PROMOTED, FORCED, REFUSED):
        _tag(client, name, plan.version_to, _verdict(entry))
    entry.close(note=note)


def undo(client: "MlflowClient", name: str, entry: Entry) -> None:
    """Put the aliases back to where they were before the entry, except where somebody has moved them since."""
    plan, before = entry.plan, entry.plan.before
    now, there = read_aliases(client, name), _versions(client, name) | {None}
    if now.champion in (before.champion, plan.version_to) and before.champion in there:
        serve(client, name, before.champion, before.previous if before.previous in there else None)
    if now.challenger is None and before.challenger == plan.version_to and before.challenger in there:
        point(client, name, CHALLENGER, before.challenger)
    left = plan.version_from if plan.outcome == ROLLED_BACK and plan.version_from in there else None
    if left and client.get_model_version(name, left).tags.get(ROLLED_BACK_TAG) == _mark(entry):
        client.delete_model_version_tag(name, left, ROLLED_BACK_TAG)


def disagreements(client: "MlflowClient", name: str) -> list[str]:
    """A line for each thing in the registry that the history does not account for; empty if it tells everything."""
    history = journal.decisions(client, name)
    lines = []
    for entry in history:
        if entry.torn:
            lines.append(f"the history lacks an entry before that of {entry.when} ({entry.outcome}, {entry.route})")
        if entry.remark:
            lines.append(f"the history's entry of {entry.when} ({entry.outcome}, {entry.route}) was {entry.remark}")
        elif entry.outcome == OPEN:
            lines.append(
                f"the change of {entry.when} ({entry.route}) is not finished: it is under way, or it was interrupted "
                "and the next command that changes the registry settles it"
            )
    if any(entry.outcome == OPEN and not entry.remark for entry in history):
        return lines
    return lines + _moved(history, read_aliases(client, name), _versions(client, name))


def _record_moves(client: "MlflowClient", workspace: Workspace, name: str) -> None:
    """Make what was done by hand a part of the history, and go on from there."""
    history, now = journal.decisions(client, name), read_aliases(client, name)
    findings = _moved(history, now, _versions(client, name))
    if not findings:
        return
    for finding in findings:
        _logger.warning("%s; it is recorded", finding)
    plan = Plan(MOVED, journal.served(history), now.champion, previous=now.previous, before=now, findings=findings)
    journal.begin(client, workspace, name, plan, {}).close()


def _moved(history: list[Decision], now: Aliases, there: set[str]) -> list[str]:
    lines = []
    for alias, actual, told in (
        (CHAMPION, now.champion, journal.served(history)),
        (PREVIOUS, now.previous, journal.served_previously(history)),
    ):
        if actual == told:
            continue
        is_now = f"version {actual}" if actual else "not set"
        was = f"version {told}" if told else "none"
        how = ", which was deleted by hand" if told and told not in there else ": it was moved by hand"
        lines.append(f"@{alias} is {is_now}; by the history it is {was}{how}")
    return lines


def _versions(client: "MlflowClient", name: str) -> set[str]:
    return {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}


def _tag(client: "MlflowClient", name: str, version: str | None, tags: dict[str, str]) -> None:
    """Set tags of a version, unless it was deleted."""
    from mlflow.exceptions import MlflowException

    for key, value in tags.items():
        try:
            client.set_model_version_tag(name, str(version), key, value)
        except MlflowException as error:
            if error.error_code not in NOT_THERE:
                raise


def _mark(entry: Entry) -> str:
    return f"{entry.when}: {entry.plan.reason}"


def _verdict(entry: Entry) -> dict[str, str]:
    """The verdict as tags of the version that was judged."""
    passed = entry.plan.outcome == PROMOTED
    tags = {
        "darkroom.verdict": "passed" if passed else "refused",
        "darkroom.verdict_at": entry.when,
        "darkroom.verdict_reasons": journal.findings_text(entry.plan.findings),
    }
    return tags | ({"darkroom.relation": entry.plan.relation} if entry.plan.relation else {})
