"""One training, one run, every point once: whatever happens in between."""

from pathlib import Path

from darkroom.params import load_params
from darkroom.registry.runs import TrainingLog, ensure_experiment, write_history
from darkroom.registry.tracking import connect
from darkroom.workspace import Workspace
from tests.integration.registry_project import empty_database, workspace

__all__ = ["empty_database", "workspace"]  # fixtures

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


def rows(start: int, stop: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1 / (1 + step), "lr": 2e-3} for step in range(start, stop)]


def test_a_resumed_training_continues_its_run_and_no_point_is_there_twice(workspace: Workspace) -> None:
    log = TrainingLog.open(workspace, "a" * 64, PARAMS, {"darkroom.data": "d"})
    log.log(rows(0, 10))
    log.close("KILLED")
    log = TrainingLog.open(workspace, "a" * 64, PARAMS, {"darkroom.data": "d"})
    log.log(rows(5, 12))  # from the last checkpoint, before the last point
    log.log(rows(12, 1200))
    log.close("FINISHED")

    client = connect(workspace)
    experiment = client.get_experiment_by_name(PARAMS.registry.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["darkroom.fingerprint"] == "a" * 64
    assert run.data.tags["darkroom.data"] == "d"
    assert run.data.params["train.model.channels"] == str(PARAMS.train.model.channels)
    assert run.data.params["data.source"] == "digits"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(s, 1 / (1 + s)) for s in range(1200)]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "lr")] == list(range(1200))


def test_another_training_gets_another_run(workspace: Workspace) -> None:
    for fingerprint in ("a" * 64, "b" * 64):
        TrainingLog.open(workspace, fingerprint, PARAMS, {}).close("FINISHED")
    client = connect(workspace)
    experiment = ensure_experiment(client, workspace, PARAMS.registry.name)
    found = {run.data.tags["darkroom.fingerprint"] for run in client.search_runs([experiment])}
    assert found == {"a" * 64, "b" * 64}


def test_history_is_written_once_over_many_batches(workspace: Workspace) -> None:
    client = connect(workspace)
    run_id = client.create_run(ensure_experiment(client, workspace, "batches")).info.run_id
    history = [(0, row) for row in rows(0, 1501)]
    assert write_history(client, run_id, history) == 3002
    assert write_history(client, run_id, history) == 0
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == list(range(1501))


def test_parameters_that_changed_without_changing_the_training_do_not_break_the_run(workspace: Workspace) -> None:
    TrainingLog.open(workspace, "a" * 64, PARAMS, {}).close("KILLED")
    elsewhere = PARAMS.model_copy(update={"data": PARAMS.data.model_copy(update={"source": "copy/of/digits"})})
    log = TrainingLog.open(workspace, "a" * 64, elsewhere, {})
    log.log(rows(0, 3))
    log.close("FINISHED")
    client = connect(workspace)
    (run,) = client.search_runs([ensure_experiment(client, workspace, PARAMS.registry.name)])
    assert run.data.params["data.source"] == "digits"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 3
