"""The flows' command lines: what they refuse before a server starts, and what a retraining prints."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.retrain_project import REFUSAL, REPOSITORY, STAGES, Answers, make_ready, promotion

Project = Callable[..., Path]


def run(root: Path, *command: str, api: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": api},
        capture_output=True,
        text=True,
    )


def test_bad_parameters_stop_the_command_before_any_server_starts(dvc_project: Project) -> None:
    root = dvc_project(**STAGES)
    text = (REPOSITORY / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("label_dropout:", "lable_dropout:"))
    (root / "below").mkdir()
    done = run(root / "below", "flows.retrain")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'unknown key; did you mean "label_dropout"?' in done.stderr
    assert done.stdout == ""


def test_a_prefect_server_that_does_not_answer_is_named_in_one_line(dvc_project: Project) -> None:
    root = dvc_project(**STAGES)
    (root / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    done = run(root, "flows.reproduce", api="http://127.0.0.1:9/api")
    assert done.returncode == 1
    assert done.stderr.startswith("PREFECT_API_URL = http://127.0.0.1:9/api: no Prefect server answers there: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.steps=7"], "--set needs --ref"),
        (["--ref", "HEAD", "--set", "train.steps"], "expected KEY=VALUE, such as train.steps=2000"),
        (["--ref", "HEAD", "--set", "train.steps=["], "--set train.steps: its value is not YAML"),
    ],
)
def test_a_parameter_without_a_workspace_or_a_value_is_refused(
    dvc_project: Project, arguments: list[str], message: str
) -> None:
    done = run(dvc_project(**STAGES), "flows.retrain", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("prefect_server")
def test_the_command_prints_the_verdict_the_stages_and_how_to_pull(
    dvc_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL

    monkeypatch.setenv("ANSWERS", str(tmp_path / "answers"))
    answers = Answers(tmp_path / "answers")
    root = make_ready(dvc_project(**STAGES))
    api = PREFECT_API_URL.value() or ""

    done = run(root, "flows.retrain", "--ref", "master", "--set", "train.steps=7", api=api)
    assert done.returncode == 0, done.stderr
    assert "Promoted: version 2 of digits passed the gate and serves now; before: version 1." in done.stdout
    assert "| first  | Ran" in done.stdout
    assert 'mlflow.pyfunc.load_model("models:/digits@champion")' in done.stdout
    assert not (root / "a").exists()

    answers.say("promote", {"stdout": promotion(False, False, "2", None, [REFUSAL]), "code": 1})
    answers.say("status", {"stdout": {"champion": None}})
    done = run(root, "flows.retrain", api=api)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"Nothing serves: {REFUSAL}"
    assert (root / "b").read_text() == "1"
