"""Ties do not slide: a challenger is compared with the best champion so far as well."""

import json
from typing import Any

import pytest

from darkroom.cli import main
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.files import write_json
from darkroom.registry import best, promotion
from darkroom.registry.promotion import history, promote, rollback
from darkroom.registry.tracking import connect
from darkroom.registry.versions import score_tag, stored_score
from darkroom.workspace import Workspace
from tests.integration.registry_project import empty_database, score_record, workspace
from tests.integration.registry_versions import add_version, pretend_to_prove

__all__ = ["empty_database", "workspace"]  # fixtures

BAR = "best champion's FID + margin"  # the margin is 0.1 here


@pytest.fixture(autouse=True)
def _proven(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_to_prove(monkeypatch)


def served(project: Workspace, *fids: float) -> None:
    for fid in fids:
        add_version(project, fid)
        assert promote(project).promoted


def test_a_tie_with_the_champion_that_is_worse_than_the_best_is_refused(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served(workspace, 0.5, 0.57)
    add_version(workspace, 0.64)
    ended = promote(workspace)
    assert (ended.promoted, ended.relation) == (False, "worse")
    assert ended.reasons == [f"unguided.fid is 0.64: expected at most 0.6 ({BAR})"]
    assert (ended.figures["champion.unguided.fid"], ended.figures["best.unguided.fid"]) == (0.57, 0.5)
    monkeypatch.chdir(workspace.root)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["history"])
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "1 is the best so far" in line and "none -> 1" in line]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["history", "--json"])
    assert [entry["best"] for entry in json.loads(capsys.readouterr().out)] == [True, False, False]


def test_thirty_challengers_that_are_a_little_worse_each_do_not_get_far(workspace: Workspace) -> None:
    fid = 0.5
    for _ in range(6):
        add_version(workspace, fid * 1.05)
        if promote(workspace).promoted:
            fid *= 1.05
    assert fid == pytest.approx(0.5 * 1.05**4)  # the first one, 0.525, is the bar: 0.625 at most


def test_an_override_sets_the_bar_anew(workspace: Workspace) -> None:
    served(workspace, 0.5)
    add_version(workspace, 0.7)
    assert not promote(workspace).promoted
    assert promote(workspace, reason="the old data was wrong", force=True).promoted
    served(workspace, 0.78)


def test_an_override_that_is_rolled_back_leaves_the_bar_as_it_was(workspace: Workspace) -> None:
    served(workspace, 0.5, 0.57)
    add_version(workspace, 0.9)
    promote(workspace, reason="a try", force=True)
    rollback(workspace, "a bad one")
    add_version(workspace, 0.64)
    assert promote(workspace).reasons == [f"unguided.fid is 0.64: expected at most 0.6 ({BAR})"]


def test_without_a_champion_the_best_one_that_served_is_still_the_bar(workspace: Workspace) -> None:
    served(workspace, 0.5, 0.57)
    connect(workspace).delete_registered_model_alias("digits", "champion")
    add_version(workspace, 0.64)
    assert promote(workspace).reasons == [f"unguided.fid is 0.64: expected at most 0.6 ({BAR})"]


def test_records_of_an_older_format_are_no_traceback(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    """After an update of Darkroom the history knows who was best, and nothing else does."""
    served(workspace, 0.5, 0.57)
    client = connect(workspace)
    for number in ("1", "2"):
        version = client.get_model_version("digits", number)
        (key,) = [key for key in version.tags if key.startswith("darkroom.score.")]
        old = json.loads(version.tags[key]) | {"fid_bootstrap": [0.4, 0.6]}
        client.set_model_version_tag("digits", number, key, json.dumps(old))
    told = history(workspace)
    assert best.best_version(workspace, told) == "1"
    found = best.best_champion(
        client, workspace, workspace.params(), client.get_model_version("digits", "2"), "a" * 64, None
    )
    assert found is None, "version 1 has no package here that could be scored again"
    assert "version 1, the best so far, sets no bar any more" in caplog.text


def test_a_version_that_was_rolled_back_is_no_bar(workspace: Workspace) -> None:
    served(workspace, 0.6, 0.45)
    rollback(workspace, "it draws sixes upside down")
    served(workspace, 0.68)


def test_what_was_moved_by_hand_is_no_bar_and_a_deleted_version_neither(workspace: Workspace) -> None:
    served(workspace, 0.5, 0.57)
    client = connect(workspace)
    client.delete_model_version("digits", "1")
    served(workspace, 0.64)
    number = add_version(workspace, 0.1)
    client.set_registered_model_alias("digits", "champion", number)
    client.set_registered_model_alias("digits", "champion", "3")
    served(workspace, 0.66)


def test_under_a_new_protocol_the_best_one_is_scored_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New data makes another protocol, under which nobody but the challenger has a score yet."""
    served(workspace, 0.5, 0.57)
    number = add_version(workspace, 0.9)
    client, again = connect(workspace), {"1": 0.55, "2": 0.63}
    scored: list[str] = []

    def score_version(_: Any, __: Any, ___: Any, version: Any, protocol: str) -> ScoreRecord:
        if record := stored_score(version, protocol):
            return record
        scored.append(str(version.version))
        record = score_record(str(version.version) * 64, fid=again[str(version.version)], code="c" * 64, steps=7)
        client.set_model_version_tag("digits", version.version, score_tag(protocol), json.dumps(record.to_json_dict()))
        return record

    for module in (best, promotion):
        monkeypatch.setattr(module, "score_version", score_version)
    for fid, refused in ((0.7, [f"unguided.fid is 0.7: expected at most 0.65 ({BAR})"]), (0.64, [])):
        record = score_record("3" * 64, fid=fid, code="c" * 64, steps=7)
        client.set_model_version_tag(
            "digits", number, score_tag(record.protocol_digest), json.dumps(record.to_json_dict())
        )
        write_json(workspace.metrics_file, record.to_json_dict())
        assert promote(workspace).reasons == refused
    assert scored == ["2", "1"], "each once, although two challengers were compared"
    assert [entry.outcome for entry in history(workspace)] == ["promoted", "promoted", "refused", "promoted"]
