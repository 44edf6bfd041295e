"""The registry for real: SQLite, files, clean processes."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from darkroom.cli import main
from darkroom.diffusion.model import DiffusionModel, read_draw_params
from darkroom.errors import InputError, StageFailed
from darkroom.evaluation.rescore import score_model
from darkroom.files import digest_file, read_json, write_json, write_text
from darkroom.registry.fetch import fetch_model
from darkroom.registry.lineage import sync_run
from darkroom.registry.promotion import history, promote, register, rollback, status
from darkroom.registry.runs import TrainingLog
from darkroom.registry.tracking import RegistryUnavailable, connect, tracking_uri
from darkroom.registry.versions import stored_score, version_at
from darkroom.workspace import Workspace
from tests.integration.registry_project import (
    STEPS,
    empty_database,
    set_params,
    workspace,
    write_extractor,
    write_model,
    write_score,
)
from tests.integration.registry_versions import pretend_to_prove

__all__ = ["empty_database", "workspace"]  # fixtures


def versions(project: Workspace) -> list[Any]:
    return list(connect(project).search_model_versions("name = 'digits'"))


def artifacts(project: Workspace) -> Path:
    (directory,) = (project.state / "artifacts" / "models").glob("*/artifacts")
    return directory


def clean_environment(project: Workspace) -> dict[str, str]:
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "OMP_NUM_THREADS") if key in os.environ}
    return keep | {"MLFLOW_TRACKING_URI": tracking_uri(project)}


def test_registering_twice_gives_the_same_version_and_adds_nothing(workspace: Workspace) -> None:
    first = register(workspace)
    assert (first.name, first.version, first.created) == ("digits", "1", True)
    client = connect(workspace)
    before = client.get_run(first.run_id).to_dictionary(), client.get_model_version("digits", "1")
    second = register(workspace)
    assert (second.version, second.created, second.run_id) == ("1", False, first.run_id)
    assert len(versions(workspace)) == 1
    assert len(list((workspace.state / "artifacts" / "models").iterdir())) == 1
    after = client.get_run(first.run_id).to_dictionary(), client.get_model_version("digits", "1")
    assert dict(after[1]) == dict(before[1])
    assert after[0] == before[0]
    assert "MLFLOW_TRACKING_URI" not in os.environ, "the process must not be left with another server"


def test_the_version_says_where_it_comes_from_and_how_it_scored(workspace: Workspace) -> None:
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", *identity, *command], cwd=workspace.root, check=True)
    write_text(workspace.root / "dvc.lock", "schema: '2.0'\nstages: {}\n")
    record = write_score(workspace, fid=0.25)
    registered = register(workspace)
    version = connect(workspace).get_model_version_by_alias("digits", "challenger")
    assert version.version in (1, "1")
    tags = version.tags
    assert tags["darkroom.weights"] == digest_file(workspace.models / "ema.safetensors")
    assert tags["darkroom.fingerprint"] == f"{1:064x}"
    assert tags["darkroom.data_digest"] == "d" * 64
    assert tags["darkroom.protocol"] == record.protocol_digest
    assert tags["darkroom.dvc_lock"] == digest_file(workspace.root / "dvc.lock")
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=workspace.root, capture_output=True, text=True, check=True).stdout.strip()
    assert tags["darkroom.git_commit"] == commit
    assert tags["darkroom.git_dirty"] == "true"
    assert tags["unguided.fid"] == "0.25"
    assert stored_score(version, record.protocol_digest) == record
    run = connect(workspace).get_run(registered.run_id)
    assert run.data.tags["darkroom.git_commit"] == commit
    assert run.data.metrics["unguided.fid"] == 0.25
    assert run.info.status == "FINISHED"
    files = {file.path for file in connect(workspace).list_artifacts(registered.run_id)}
    assert files == {"dvc.lock", "params.yaml", "metrics.json", "model_card.md", "project"}


def test_scores_under_another_protocol_are_added_to_the_one_version(workspace: Workspace) -> None:
    first = write_score(workspace, fid=0.5)
    register(workspace)
    second = write_score(workspace, fid=0.6, guidance_scale=3.0)
    assert not register(workspace).created
    refused = promote(workspace)  # it passes, but not as what it serves
    assert not refused.promoted
    assert "draws by default with guidance_scale 2.0, measured with 3.0" in refused.reasons[0]
    write_score(workspace, fid=0.5)
    assert not register(workspace).created
    (version,) = versions(workspace)
    assert stored_score(version, first.protocol_digest) == first
    assert stored_score(version, second.protocol_digest) == second
    assert version.tags["darkroom.protocol"] == first.protocol_digest
    assert version.tags["unguided.fid"] == "0.5"


def test_code_that_changed_since_it_was_measured_is_not_registered(workspace: Workspace) -> None:
    write_score(workspace, code="0" * 64)
    with pytest.raises(InputError, match="code that draws and measures changed since evaluate ran"):
        register(workspace)


@pytest.mark.parametrize("spelling", ["4e-3", "4.0e-3", "1e-5"])
def test_any_spelling_of_a_number_is_what_dvc_locked(workspace: Workspace, spelling: str) -> None:
    import dvc.utils.serialize

    text = re.sub("learning_rate: .*", f"learning_rate: {spelling}", workspace.params_file.read_text())
    workspace.params_file.write_text(text)
    locked = dvc.utils.serialize.load_yaml(str(workspace.params_file))
    stages = {"train": {"params": {"params.yaml": {"train": locked["train"]}}}}
    dvc.utils.serialize.dump_yaml(str(workspace.root / "dvc.lock"), {"schema": "2.0", "stages": stages})
    assert register(workspace).created


def test_bad_parameters_are_what_register_reports(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace.root)
    for text, message in (("data: [", "params.yaml:"), ("", "params.yaml: expected the groups")):
        workspace.params_file.write_text(text)
        with pytest.raises(SystemExit) as done:
            main(["register"])
        assert done.value.code == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_promotion_leaves_the_champion_alone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(workspace)
    pretend_to_prove(monkeypatch)
    promote(workspace)
    write_model(workspace, 2)
    write_score(workspace, fid=0.4)
    register(workspace)

    def interrupted(*_: object) -> None:
        assert str(version_at(connect(workspace), "digits", "champion").version) == "1"  # type: ignore[union-attr]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("darkroom.registry.promotion.prove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            promote(workspace)
    assert str(version_at(connect(workspace), "digits", "champion").version) == "1"  # type: ignore[union-attr]
    assert history(workspace)[-1].outcome == "failed"
    assert promote(workspace).version == "2"


def test_what_a_dead_server_missed_is_in_the_run_after_register(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    log = TrainingLog.open(workspace, f"{1:064x}", workspace.params(), {})
    log.log([{"step": 1, "loss": 1.0}])
    log.close("FINISHED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    registered = register(workspace)
    client = connect(workspace)
    points = client.get_metric_history(registered.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(s, 1 / s) for s in range(1, STEPS + 1)]
    run = client.get_run(registered.run_id)
    assert run.data.params["train.steps"] == str(STEPS)
    assert run.data.tags["darkroom.fingerprint"] == f"{1:064x}"


def test_the_run_of_a_training_that_logged_half_is_completed_not_doubled(workspace: Workspace) -> None:
    log = TrainingLog.open(workspace, f"{1:064x}", workspace.params(), {})
    log.log([{"step": step, "images": step * 128, "loss": 1 / step, "lr": 2e-3} for step in range(1, 20)])
    log.close("KILLED")
    run_id = sync_run(workspace)
    assert sync_run(workspace) == run_id
    client = connect(workspace)
    for key in ("loss", "lr", "images"):
        assert [p.step for p in client.get_metric_history(run_id, key)] == list(range(1, STEPS + 1))
    assert client.get_run(run_id).info.status == "FINISHED"
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1


def _remove(name: str) -> Any:
    return lambda project: (project.root / name).unlink()


def _other_weights(project: Workspace) -> None:
    path = project.models / "ema.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def _scores_of_another_model(project: Workspace) -> None:
    record = read_json(project.metrics_file)
    write_json(project.metrics_file, record | {"weights_digest": "0" * 64})


def _params_changed(project: Workspace) -> None:
    params = yaml.safe_load(project.params_file.read_text())
    lock = {"stages": {"train": {"params": {"params.yaml": {"train": params["train"] | {"steps": 1}}}}}}
    write_text(project.root / "dvc.lock", yaml.safe_dump(lock))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("models/ema.safetensors"), "ema.safetensors"),
        (_remove("models/model.json"), "model.json"),
        (_remove("models/run.json"), "run.json"),
        (_remove("reports/metrics.json"), "metrics.json"),
        (_remove("reports/train/history.jsonl"), "history.jsonl"),
        (_other_weights, "sha256"),
        (_scores_of_another_model, "not of one model"),
        (_params_changed, "params.yaml: train changed"),
    ],
)
def test_outputs_that_are_missing_or_not_of_one_training_are_not_registered(
    workspace: Workspace, damage: Any, words: str
) -> None:
    damage(workspace)
    with pytest.raises(InputError, match=words) as error:
        register(workspace)
    assert "dvc repro" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert versions(workspace) == []


def test_weights_that_are_not_finite_are_not_registered(workspace: Workspace) -> None:
    path = workspace.models / "ema.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path)
    for name in ("models/model.json", "models/run.json", "reports/metrics.json"):
        content = read_json(workspace.root / name)
        write_json(workspace.root / name, content | {"weights_digest": digest_file(path)})
    with pytest.raises(InputError, match="finite"):
        register(workspace)


@pytest.mark.slow
def test_promotion_refusal_override_and_rollback_with_their_history(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(workspace)
    first = promote(workspace)
    assert (first.promoted, first.changed, first.version, first.previous) == (True, True, "1", None)
    assert first.relation == "first"
    assert 0 < first.figures["seconds_per_image"] < workspace.params().registry.gate.max_seconds_per_image
    verdict = version_at(connect(workspace), "digits", "champion").tags  # type: ignore[union-attr]
    assert (verdict["darkroom.verdict"], verdict["darkroom.relation"]) == ("passed", "first")
    assert json.loads(verdict["darkroom.verdict_reasons"]) == []
    again = promote(workspace)
    assert (again.promoted, again.changed, again.version) == (True, False, "1")
    assert status(workspace)["challenger"] is None

    write_model(workspace, 2)
    write_score(workspace, fid=0.7)
    register(workspace)
    monkeypatch.chdir(workspace.root)
    with pytest.raises(SystemExit) as done:
        main(["promote"])
    assert done.value.code == 1
    printed = capsys.readouterr()
    assert "unguided.fid is 0.7: expected at most 0.6" in printed.err
    assert version_at(connect(workspace), "digits", "champion").version in (1, "1")  # type: ignore[union-attr]

    with pytest.raises(InputError, match="reason"):
        promote(workspace, force=True)
    forced = promote(workspace, force=True, reason="the old one draws no sevens")
    assert (forced.promoted, forced.version, forced.previous) == (True, "2", "1")
    back = rollback(workspace, "sevens are mirrored")
    assert (back.version, back.previous) == ("1", "2")
    with pytest.raises(InputError, match="nothing to roll back to"):
        rollback(workspace, "further")

    write_score(workspace, fid=0.4)  # now it would pass, but it was rolled back
    register(workspace)
    refused = promote(workspace)
    assert not refused.promoted
    assert "was rolled back" in refused.reasons[0]
    assert "sevens are mirrored" in refused.reasons[0]

    told = [(entry.outcome, entry.version_from, entry.version_to, entry.reason) for entry in history(workspace)]
    assert told == [
        ("promoted", None, "1", ""),
        ("refused", "1", "2", ""),
        ("forced", "1", "2", "the old one draws no sevens"),
        ("rolled back", "2", "1", "sevens are mirrored"),
        ("refused", "1", "2", ""),
    ]
    assert history(workspace)[1].figures["challenger.unguided.fid"] == 0.7
    assert history(workspace)[1].figures["champion.unguided.fid"] == 0.5
    for command in ("status", "history"):
        with pytest.raises(SystemExit) as done:
            main([command])
        assert done.value.code == 0
    printed = capsys.readouterr()
    assert "@champion: digits version 1" in printed.out
    assert "the old one draws no sevens" in printed.out


@pytest.mark.slow
def test_a_model_that_does_not_load_from_the_registry_leaves_the_aliases_as_they_were(workspace: Workspace) -> None:
    register(workspace)
    client = connect(workspace)
    client.set_registered_model_alias("digits", "champion", "1")
    write_model(workspace, 2)
    write_score(workspace)
    register(workspace)
    (packaged,) = (
        path
        for path in (workspace.state / "artifacts" / "models").rglob("ema.safetensors")
        if digest_file(path) == digest_file(workspace.models / "ema.safetensors")
    )
    packaged.write_bytes(packaged.read_bytes()[:-1] + b"\x00")
    with pytest.raises(StageFailed, match="sha256"):
        promote(workspace)
    aliases = {alias: found and found["version"] for alias, found in status(workspace).items()}
    assert aliases == {"champion": "1", "challenger": "2", "previous": None}
    assert [entry.outcome for entry in history(workspace)] == ["moved by hand", "failed"]
    assert client.get_model_version_by_alias("digits", "champion").version in (1, "1")


@pytest.mark.slow
def test_a_champion_with_another_protocol_is_scored_again_and_not_compared(workspace: Workspace) -> None:
    set_params(
        workspace,
        "registry",
        gate={
            "max_fid": 1e6,
            "min_class_accuracy": 0.0,
            "min_guided_class_accuracy": 0.0,
            "min_worst_class_accuracy": 0.0,
            "max_near_copies": 1.0,
            "margin": 1e6,
            "retraining_scatter": 0.0,
            "max_seconds_per_image": 100.0,
        },
    )
    write_extractor(workspace)

    def evaluate() -> Any:
        params = workspace.params()
        model = DiffusionModel.load(workspace.models)
        record = score_model(model, workspace.extractor, params.sample, params.evaluate)
        write_json(workspace.metrics_file, record.to_json_dict())
        return record

    old = evaluate()
    register(workspace)
    connect(workspace).set_registered_model_alias("digits", "champion", "1")
    set_params(workspace, "sample", guidance_scale=3.0)
    expected = evaluate()  # the champion under the new protocol
    write_model(workspace, 2)
    new = evaluate()
    assert new.protocol_digest == expected.protocol_digest != old.protocol_digest
    register(workspace)
    promotion = promote(workspace)
    assert promotion.promoted
    assert promotion.figures["champion.guided.fid"] == expected.guided.fid.value
    champion_before = connect(workspace).get_model_version("digits", "1")
    assert stored_score(champion_before, new.protocol_digest) == expected
    assert stored_score(champion_before, old.protocol_digest) == old


def test_a_registered_model_is_fetched_as_files_and_draws_like_the_one_on_disk(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params(workspace, "sample", spacing="log_snr", clipping="dynamic", guidance_interval=[0.1, 50.0])
    write_score(workspace, spacing="log_snr", clipping="dynamic", guidance_interval=[0.1, 50.0])
    register(workspace)
    empty = tmp_path / "fetched"
    empty.mkdir()
    directory = fetch_model(workspace, "models:/digits@challenger", empty)
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "draw.json",
        "ema.safetensors",
        "model.json",
    ]
    measured = read_draw_params(directory)
    assert measured is not None
    assert measured == workspace.params().sample.changed()
    fetched, own = DiffusionModel.load(directory), DiffusionModel.load(workspace.models)
    assert fetched.card == own.card
    labels = torch.arange(4)
    assert torch.equal(fetched.draw(labels, measured, seed=1), own.draw(labels, measured, seed=1))
    with pytest.raises(InputError, match="models:/digits/7: "):
        fetch_model(workspace, "models:/digits/7", empty)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RegistryUnavailable, match="does not answer"):
        fetch_model(workspace, "models:/digits@challenger", empty)
