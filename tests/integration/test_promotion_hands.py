"""What people do to the registry behind the commands' back is said, recorded, and no reason to stop."""

import contextlib
import logging
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from darkroom.errors import InputError, StageFailed
from darkroom.registry import journal, promotion
from darkroom.registry.journal import experiment
from darkroom.registry.lock import registry
from darkroom.registry.promotion import disagreements, history, promote, rollback
from darkroom.registry.proof import Proof
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests.integration.registry_project import empty_database, workspace
from tests.integration.registry_versions import add_version, aliases, locks, open_entries, pretend_to_prove, tags

__all__ = ["empty_database", "workspace"]  # fixtures


@pytest.fixture
def serving(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Version 2 serves, 1 served before, 3 waits."""
    pretend_to_prove(monkeypatch)
    for _ in range(2):
        add_version(workspace)
        promote(workspace)
    add_version(workspace)
    return workspace


def said(project: Workspace) -> list[str]:
    return disagreements(connect(project), "digits")


def told(project: Workspace) -> list[tuple[str, str]]:
    return [(entry.outcome, entry.route) for entry in history(project)]


def settle(project: Workspace) -> None:
    with registry(project):
        pass


def test_an_undisturbed_history_has_nothing_to_say(serving: Workspace) -> None:
    assert said(serving) == []
    settle(serving)
    assert told(serving) == [("promoted", "none -> 1"), ("promoted", "1 -> 2")]


def test_a_champion_that_was_moved_by_hand_is_said_and_recorded(
    serving: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    connect(serving).set_registered_model_alias("digits", "champion", "3")
    line = "@champion is version 3; by the history it is version 2: it was moved by hand"
    assert said(serving) == [line]
    with caplog.at_level(logging.WARNING):
        settle(serving)
    assert f"{line}; it is recorded" in caplog.messages
    assert told(serving)[-1] == ("moved by hand", "2 -> 3")
    assert history(serving)[-1].findings == [line]
    assert said(serving) == []
    settle(serving)
    assert len(told(serving)) == 3, "it is recorded once"
    assert rollback(serving, "it was never judged").version == "1"
    assert aliases(serving)["champion"] == "1"


def test_a_champion_that_was_deleted_is_none_and_the_next_is_the_first(serving: Workspace) -> None:
    client = connect(serving)
    client.delete_model_version("digits", "2")
    assert said(serving) == ["@champion is not set; by the history it is version 2, which was deleted by hand"]
    done = promote(serving)
    assert (done.version, done.previous, done.relation) == ("3", None, "first")
    assert told(serving) == [
        ("promoted", "none -> 1"),
        ("promoted", "1 -> 2 (deleted)"),
        ("moved by hand", "2 (deleted) -> none"),
        ("promoted", "none -> 3"),
    ]
    assert said(serving) == []


def test_a_rollback_to_a_deleted_version_says_so_and_changes_nothing(serving: Workspace) -> None:
    connect(serving).delete_model_version("digits", "1")
    for _ in range(2):
        with pytest.raises(InputError, match=r"no @previous \(version 1 was deleted\): there is nothing to roll back"):
            rollback(serving, "sevens are mirrored")
    assert aliases(serving) == {"champion": "2", "challenger": "3"}
    assert [outcome for outcome, _ in told(serving)] == ["promoted", "promoted", "moved by hand"]
    assert (locks(serving), open_entries(serving)) == ([], 0)


def test_a_previous_that_was_moved_by_hand_is_said(serving: Workspace) -> None:
    connect(serving).set_registered_model_alias("digits", "previous", "3")
    assert said(serving) == ["@previous is version 3; by the history it is version 1: it was moved by hand"]
    settle(serving)
    assert told(serving)[-1] == ("moved by hand", "2 -> 2")
    assert said(serving) == []


def test_a_champion_that_nobody_promoted_is_said(workspace: Workspace) -> None:
    assert said(workspace) == []
    add_version(workspace)
    connect(workspace).set_registered_model_alias("digits", "champion", "1")
    assert said(workspace) == ["@champion is version 1; by the history it is none: it was moved by hand"]


def test_entries_that_were_edited_or_deleted_are_marked_and_still_told(serving: Workspace) -> None:
    client = connect(serving)
    first, second = history(serving)
    client.set_tag(first.run_id, "darkroom.reason", "all was well")
    client.delete_run(second.run_id)
    assert [entry.remark for entry in history(serving)] == ["edited by hand", "deleted by hand"]
    assert [line.rpartition(" was ")[2] for line in said(serving)] == ["edited by hand", "deleted by hand"]
    assert promote(serving).previous == "2"
    assert [entry.remark for entry in history(serving)] == ["edited by hand", "deleted by hand", None]
    assert told(serving)[-1] == ("promoted", "2 -> 3")


def test_an_entry_that_was_removed_for_good_is_missed(serving: Workspace) -> None:
    promote(serving)
    removed = history(serving)[1].run_id
    with contextlib.closing(sqlite3.connect(serving.state / "mlflow.db")) as database, database:
        for table in ("tags", "metrics", "latest_metrics", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", (removed,))
    assert [entry.version_to for entry in history(serving)] == ["1", "3"]
    (line,) = said(serving)
    assert line.startswith("the history lacks an entry before that of")
    assert line.endswith("(promoted, 2 -> 3)")


def test_the_order_is_that_of_the_entries_whatever_the_clocks_say(
    serving: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_now", lambda: 1_000_000_000_000)  # a host whose clock is years behind
    promote(serving)
    assert told(serving)[-1] == ("promoted", "2 -> 3")
    assert said(serving) == []


@pytest.mark.parametrize("damage", ["figure", "tag removed"])
def test_other_ways_of_editing_an_entry_are_noticed(serving: Workspace, damage: str) -> None:
    client, entry = connect(serving), history(serving)[0]
    if damage == "figure":
        client.log_metric(entry.run_id, "challenger.unguided.fid", 0.1)
    else:
        client.delete_tag(entry.run_id, "darkroom.who")
    assert [entry.remark for entry in history(serving)] == ["edited by hand", None]


def test_a_history_experiment_that_was_deleted_is_refused_by_name(serving: Workspace) -> None:
    client = connect(serving)
    found = client.get_experiment_by_name(experiment("digits"))
    assert found
    client.delete_experiment(found.experiment_id)
    with pytest.raises(InputError, match="was deleted: `mlflow experiments restore"):
        promote(serving)
    assert aliases(serving)["champion"] == "2"


def test_entries_say_all_that_a_verdict_rests_on(serving: Workspace) -> None:
    promote(serving)
    last = history(serving)[-1]
    versions = {number: connect(serving).get_model_version("digits", number).tags for number in ("2", "3")}
    assert (last.weights_from, last.weights_to) == tuple(tag["darkroom.weights"] for tag in versions.values())
    assert last.protocol == versions["3"]["darkroom.protocol"]
    assert last.relation == "tied"
    assert last.host
    assert last.figures["seconds_per_image"] == 0.01
    assert last.figures["champion.unguided.fid"] == 0.5


@pytest.mark.parametrize(("force", "outcome"), [(False, "refused"), (True, "forced")])
def test_a_model_that_is_too_slow_is_refused_after_the_proof(
    serving: Workspace, monkeypatch: pytest.MonkeyPatch, force: bool, outcome: str
) -> None:
    limit = serving.params().registry.gate.max_seconds_per_image
    monkeypatch.setattr(promotion, "prove", lambda *_: Proof(2 * limit))
    done = promote(serving, reason="it has to go out", force=force)
    assert done.promoted == force
    (reason,) = done.reasons
    assert reason.startswith("seconds_per_image is")
    assert history(serving)[-1].outcome == outcome
    assert history(serving)[-1].findings == [reason]
    assert aliases(serving)["champion"] == ("3" if force else "2")
    marks = {key: value for (version, key), value in tags(serving).items() if version == "3"}
    assert marks["darkroom.verdict"] == "refused"
    assert "seconds_per_image" in marks["darkroom.verdict_reasons"]


def test_a_version_that_its_scores_refuse_is_not_loaded(serving: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any) -> Proof:
        raise AssertionError

    monkeypatch.setattr(promotion, "prove", loaded)
    connect(serving).set_model_version_tag("digits", "3", "darkroom.validated", "false")
    done = promote(serving)
    assert not done.promoted
    assert done.reasons == ["nothing says that the data it was trained on was validated"]
    assert (history(serving)[-1].outcome, history(serving)[-1].relation) == ("refused", "tied")


@pytest.mark.parametrize(
    "act", [lambda client: client.delete_registered_model("digits.lock"), lambda client: steal(client)]
)
def test_a_command_that_lost_its_lock_changes_nothing(
    serving: Workspace, monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], None]
) -> None:
    def prove(*_: Any) -> Proof:
        act(connect(serving))
        return Proof(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "prove", prove)
        with pytest.raises(StageFailed, match=r"the lock 'digits\.lock' was taken away"):
            promote(serving)
    assert aliases(serving) == {"champion": "2", "previous": "1", "challenger": "3"}
    assert open_entries(serving) == 1
    for lock in locks(serving):
        connect(serving).delete_registered_model(lock)
    assert promote(serving).version == "3"
    assert [outcome for outcome, _ in told(serving)][2:] == ["interrupted", "promoted"]


def steal(client: Any) -> None:
    client.delete_registered_model("digits.lock")
    client.create_registered_model("digits.lock", tags={"darkroom.lock.token": "f" * 16})
