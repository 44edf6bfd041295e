"""A sweep on a real Prefect server, with the real pipeline, small: experiments, runs, the table, and a second go."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.project import change, dvc, make_reproduced

pytestmark = [pytest.mark.usefixtures("prefect_server", "warm"), pytest.mark.slow]


@pytest.fixture(scope="module")
def small(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_reproduced(tmp_path_factory.mktemp("sweep") / "project")
    change(root, "sample", num_images=40, steps=2, seeds=[0, 1])
    subprocess.run(["git", "commit", "-qam", "quick"], cwd=root, check=True)
    return root


@pytest.fixture
def project(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARKROOM_PROJECT", str(small))
    return small


def run(grid: dict[str, list[Any]], **options: Any) -> Any:
    from flows.sweep import sweep

    return sweep(grid, return_state=True, **options)


def table() -> list[dict[str, Any]]:
    from prefect.artifacts import Artifact

    found = Artifact.get("sweep")
    assert found is not None
    return json.loads(found.data)


def runs_of(project: Path) -> list[Any]:
    from darkroom.registry.tracking import connect
    from darkroom.workspace import Workspace

    client = connect(Workspace(project))
    return client.search_runs([client.get_experiment_by_name("digits").experiment_id])


def test_a_sweep_makes_experiments_runs_and_a_table_and_another_one_carries_on(project: Path) -> None:
    before = len(runs_of(project))
    state = run({"train.steps": [10, 20], "sample.guidance_scale": [1.0]})
    assert state.is_completed(), state.message
    assert state.message == "2 of 2 combinations have a score"
    rows = table()
    assert [row["outcome"] for row in rows] == ["Ran", "Ran"]
    assert {row["train.steps"] for row in rows} == {10, 20}
    fids = [float(row["FID"].split(" ± ")[0]) for row in rows]
    assert fids == sorted(fids)
    assert all("±" in row["FID"] and "±" in row["class accuracy"] for row in rows)

    # One run each in MLflow, below the run of its training.
    found = {trial.info.run_id: trial for trial in runs_of(project)}
    for row in rows:
        trial = found[row["MLflow run"]]
        assert trial.info.run_name == row["experiment"] == f"train.steps={row['train.steps']},sample.guidance_scale=1.0"
        assert trial.data.params["train.steps"] == str(row["train.steps"])
        assert trial.data.metrics["unguided.fid"] == pytest.approx(float(row["FID"].split(" ± ")[0]), abs=1e-3)
        training = found[trial.data.tags["mlflow.parentRunId"]]
        assert training.data.params["train.steps"] == str(row["train.steps"])
        assert "loss" in training.data.metrics
    assert len(found) == before + 4

    # In the project, DVC lists the experiments and brings one back.
    listed = dvc(project, "exp", "list", "--names-only").split()
    assert sorted(listed) == sorted(row["experiment"] for row in rows)
    dvc(project, "exp", "apply", rows[0]["experiment"])
    measured = json.loads((project / "reports" / "metrics.json").read_text())
    assert f"{measured['unguided']['fid']['value']:.3f}" == rows[0]["FID"].split(" ± ")[0]
    subprocess.run(["git", "checkout", "-q", "."], cwd=project, check=True)

    # Again, with one more: what was finished is restored, and its runs are found.
    assert run({"train.steps": [10, 20, 15], "sample.guidance_scale": [1.0]}).is_completed()
    again = {row["train.steps"]: row for row in table()}
    assert [again[steps]["outcome"] for steps in (10, 20, 15)] == ["Restored", "Restored", "Ran"]
    for row in rows:
        assert again[row["train.steps"]] == row | {
            key: again[row["train.steps"]][key] for key in ("outcome", "seconds")
        }
    assert len(runs_of(project)) == before + 6
    assert not list((project / ".darkroom" / "workspaces").glob("*"))


def test_a_combination_that_fails_does_not_stop_the_others(project: Path) -> None:
    state = run({"reference.min_accuracy": [1.0, 0.5], "train.steps": [10]})
    assert state.name == "Incomplete"
    assert "1 of 2 combinations have a score" in state.message
    assert "reference.min_accuracy=1.0, train.steps=10: reference: " in state.message
    good, bad = table()
    assert (good["reference.min_accuracy"], good["outcome"]) == (0.5, "Ran")
    assert (bad["reference.min_accuracy"], bad["outcome"], bad["MLflow run"]) == (1.0, "Failed", "none")
    assert bad["reason"].startswith("reference: ")


def test_what_cannot_run_is_refused_before_anything_does(project: Path) -> None:
    refs = dvc(project, "exp", "list", "--names-only")
    for grid, options, message in (
        ({"train.steps": [10, -1]}, {}, "train.steps = -1: expected at least 1 (train.steps=-1)"),
        ({"train.stepps": [10]}, {}, 'did you mean "steps"?'),
        ({"steps": [10]}, {}, "steps"),
        ({"train.steps": [10, 20]}, {"max_runs": 1}, "2 combinations: expected at most 1"),
        ({"train.steps": [10]}, {"ref": "absent"}, "git ref 'absent' is no branch"),
    ):
        state = run(grid, **options)
        assert state.name == "BadInput"
        assert message in state.message
    assert dvc(project, "exp", "list", "--names-only") == refs
