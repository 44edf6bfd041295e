"""`darkroom lineage` with a real registry: it tells everything, and says what is missing or was altered by hand."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from darkroom.cli import main
from darkroom.errors import InputError
from darkroom.files import digest_file, write_json, write_text
from darkroom.registry.aliases import point
from darkroom.registry.promotion import promote, register
from darkroom.registry.proof import Proof
from darkroom.registry.provenance import trace
from darkroom.registry.screen import WIDTH, lineage_lines
from darkroom.registry.tracking import connect, tracking_uri
from darkroom.workspace import Workspace
from tests.integration.registry_project import CLASSES, empty_database, set_params, workspace, write_model, write_score

__all__ = ["empty_database", "workspace"]  # fixtures

DIGITS = "models:/digits/1"


@pytest.fixture(autouse=True)
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof in a clean process takes seconds and is no part of this."""
    monkeypatch.setattr("darkroom.registry.promotion.prove", lambda *_: Proof(seconds_per_image=0.01))


@pytest.fixture
def project(workspace: Workspace) -> Workspace:
    """A project with a lock and validated data."""
    splits = {"train": 1438, "test": 359}
    info = {"name": "digits", "image_size": 8, "channels": 1, "classes": CLASSES, "splits": splits, "digest": "d" * 64}
    write_json(workspace.prepared / "dataset.json", info)
    write_json(workspace.reports / "validation.json", {"success": True, "dataset": "d" * 64})
    write_text(workspace.root / "dvc.lock", "schema: '2.0'\nstages: {}\n")
    write_text(
        workspace.root / ".dvc/config", "[core]\n    remote = s\n['remote \"s\"']\n    url = s3://bucket/cache\n"
    )
    return workspace


def test_it_leads_back_to_everything(project: Workspace) -> None:
    (project.root / ".gitignore").write_text("*\n!params.yaml\n!dvc.lock\n")
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", *identity, *command], cwd=project.root, check=True)
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=project.root, capture_output=True, text=True, check=True).stdout.strip()
    record = write_score(project, fid=0.25)
    registered = register(project)
    promote(project)
    found = trace(project, "models:/digits@champion")
    assert (found.name, found.version, found.aliases) == ("digits", "1", ["champion"])
    assert (found.commit, found.dirty) == (commit, False)  # what the run has made, dvc.lock included, is no change
    assert found.weights == digest_file(project.models / "ema.safetensors")
    assert found.lock == digest_file(project.root / "dvc.lock")
    assert found.remote == "s3://bucket/cache"
    assert (found.run.run_id, found.run.status) == (registered.run_id, "FINISHED")
    assert (found.data.source, found.data.digest, found.data.validated) == ("digits", "d" * 64, True)
    assert found.data.images == {"train": 1438, "test": 359}
    assert found.record == record
    assert found.params is not None
    assert found.params["train"]["steps"] == 40
    assert found.changed == {}
    assert found.verdict is not None
    assert (found.verdict.verdict, found.verdict.relation, found.verdict.reasons) == ("passed", "first", [])
    assert [(entry.outcome, entry.version_to) for entry in found.history] == [("promoted", "1")]
    assert found.warnings == []
    lines = lineage_lines(found)
    assert len(lines) <= 45
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for shown in (commit[:12], found.weights[:12], found.lock[:12], "s3://bucket/cache", registered.run_id, "0.25"):
        assert shown in text


def test_the_screen_stays_one_screen_when_much_has_happened(project: Workspace) -> None:
    register(project)
    for number in range(6):
        promote(project, force=True, reason="a long story " * 20 + str(number))
        write_model(project, number + 2)
        write_score(project, fid=0.1 * (number + 1))
        register(project)
    set_params(project, "train", batch_size=3, steps=77, ema_decay=0.5, learning_rate=1.0, seed=9, lr_warmup_steps=2)
    set_params(project, "sample", steps=5, num_images=50, batch_size=7)
    found = trace(project, DIGITS)
    lines = lineage_lines(found)
    assert len(lines) <= 45
    assert max(map(len, lines)) <= WIDTH
    assert found.changed is not None
    assert found.changed["train.steps"] == (40, 77)
    assert any("and " in line and "more: --json lists them" in line for line in lines)


def delete_run(project: Workspace) -> None:
    client = connect(project)
    client.delete_run(client.get_model_version("digits", "1").run_id)


def lose_run(project: Workspace) -> None:
    run_id = connect(project).get_model_version("digits", "1").run_id
    with sqlite3.connect(project.state / "mlflow.db") as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            if "run_uuid" in columns and table != "model_versions":
                database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))
    database.close()


def move_alias(project: Workspace) -> None:
    point(connect(project), "digits", "champion", None)


def remove_snapshot(project: Workspace) -> None:
    for path in project.state.rglob("artifacts/project/*.zip"):
        path.unlink()


def alter_snapshot(project: Workspace) -> None:
    for path in project.state.rglob("artifacts/project/*.zip"):
        path.write_bytes(path.read_bytes() + b" ")


def remove_package(project: Workspace) -> None:
    shutil.rmtree(project.state / "artifacts" / "models")


def tag(key: str, value: str) -> Callable[[Workspace], None]:
    return lambda project: connect(project).set_model_version_tag("digits", "1", key, value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (delete_run, "was deleted: `mlflow runs restore --run-id"),
        (lose_run, "the server knows no run"),
        (move_alias, "moved by hand"),
        (remove_snapshot, "the project cannot be brought back"),
        (alter_snapshot, "was altered: its sha256 is"),
        (remove_package, "the package cannot be read"),
        (tag("darkroom.weights", "0" * 64), "the tag darkroom.weights says 000000000000"),
        (tag("darkroom.dvc_lock", "0" * 64), "darkroom.dvc_lock is not the digest"),
        (tag("unguided.fid", "0.001"), "tag unguided.fid is 0.001; measured was 0.5"),
    ],
)
def test_what_is_missing_or_was_altered_is_said_and_the_rest_is_told(
    project: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Workspace], None],
    words: str,
) -> None:
    register(project)
    promote(project)
    damage(project)
    monkeypatch.chdir(project.root)
    with pytest.raises(SystemExit) as done:
        main(["lineage", DIGITS])
    assert done.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("! ") and words in line], printed
    assert any(line.startswith("  unguided FID") for line in printed)


@pytest.mark.parametrize("lose", [delete_run, lose_run])
def test_a_run_that_is_gone_is_rebuilt_by_register_and_lineage_follows(
    project: Workspace, lose: Callable[[Workspace], None]
) -> None:
    first = register(project)
    lose(project)
    second = register(project)
    assert (second.version, second.created, second.lost_run) == ("1", False, first.run_id)
    assert second.run_id != first.run_id
    found = trace(project, DIGITS)
    assert (found.run.run_id, found.run.status, found.warnings) == (second.run_id, "FINISHED", [])
    assert connect(project).get_run(second.run_id).data.metrics["unguided.fid"] == 0.5
    third = register(project)
    assert (third.run_id, third.lost_run, third.created) == (second.run_id, None, False)


def test_data_counts_as_validated_when_the_report_is_about_it(project: Workspace) -> None:
    report = project.reports / "validation.json"
    for content in (None, "garbled", json.dumps({"success": True, "dataset": "e" * 64})):
        report.unlink(missing_ok=True)
        if content is not None:
            report.write_text(content)
        register(project)
        assert not trace(project, DIGITS).data.validated
    write_json(report, {"success": True, "dataset": "d" * 64})
    register(project)
    assert trace(project, DIGITS).data.validated


def test_the_lineage_is_that_of_the_scores_that_the_version_carries(project: Workspace) -> None:
    register(project)
    first = trace(project, DIGITS)
    write_text(project.root / "docs.md", "a later state of the project")
    register(project)
    assert trace(project, DIGITS).project == first.project
    write_score(project, fid=0.4, kid_subsets=3)
    set_params(project, "evaluate", kid_subsets=3)
    register(project)
    second = trace(project, DIGITS)
    assert second.project != first.project
    assert second.params is not None
    assert second.params["evaluate"]["kid_subsets"] == 3
    assert second.record is not None
    assert second.record.unguided.fid.value == 0.4
    assert first.record is not None
    assert second.other_protocols == [first.record.protocol_digest]
    assert second.warnings == []


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("digits", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits/latest", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits@", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/../digits/1", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits/2", "has no version 2: there are 1"),
        ("models:/digits@nobody", "has no @nobody: there are @challenger"),
        ("models:/dogs@champion", "no model is registered as 'dogs'"),
    ],
)
def test_a_version_that_is_not_there_is_one_line(project: Workspace, uri: str, words: str) -> None:
    register(project)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        trace(project, uri)
    assert str(error.value).startswith(f"{uri}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("command", ["lineage", "compare", "score", "checkout"])
def test_every_command_refuses_a_garbled_uri_in_one_line(
    project: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(project.root)
    with pytest.raises(SystemExit) as done:
        main([command, "digits"])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("darkroom: digits: expected models:/NAME@ALIAS or models:/NAME/VERSION")


def test_outside_a_project_a_version_can_be_named(
    project: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(project)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
    monkeypatch.chdir(elsewhere)
    with pytest.raises(SystemExit) as done:
        main(["lineage", DIGITS, "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["changed"] is None
    assert told["params"]["train"]["steps"] == 40
    assert told["record"]["unguided"]["fid"]["value"] == 0.5
    with pytest.raises(SystemExit) as done:
        main(["lineage"])
    assert done.value.code == 2
    assert "the model has to be named" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


def test_reading_the_registry_needs_no_torch(project: Workspace) -> None:
    register(project)
    program = (
        "import sys\nfrom darkroom.cli import main\n"
        f"for command in (['lineage', '{DIGITS}'], ['compare', '{DIGITS}', '{DIGITS}'], ['status'], ['history']):\n"
        "    try: main(command)\n    except SystemExit as done: assert done.code == 0, command\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=project.root, env=dict(os.environ), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_a_lock_that_is_of_other_outputs_is_not_registered(project: Workspace) -> None:
    lock = "stages:\n  evaluate:\n    outs:\n    - path: reports/metrics.json\n      md5: {}\n"
    write_text(project.root / "dvc.lock", lock.format("0" * 32))
    with pytest.raises(InputError, match=r"reports/metrics\.json is not what dvc\.lock says that stage evaluate wrote"):
        register(project)
