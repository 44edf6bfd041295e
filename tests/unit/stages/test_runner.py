import errno

import pytest

from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.stages.runner import outcome


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (InputError("a.png: cut short\nb.png: empty"), 2, "train: a.png: cut short\ntrain: b.png: empty\n"),
        (StageFailed("the loss is not finite"), 1, "train: the loss is not finite\n"),
        (FloatingPointError("not finite at timestep 7"), 1, "train: not finite at timestep 7\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "models/ema.safetensors"),
            1,
            "train: models/ema.safetensors cannot be written or read: No space left on device; nothing half-written is"
            " left\n",
        ),
        (Interrupted("stopped at step 7"), 75, "train: stopped at step 7\n"),
        (KeyboardInterrupt(), 130, "train: interrupted; nothing half-written is left\n"),
    ],
)
def test_each_ending_has_its_exit_code_and_its_lines(project, capsys, error, code, printed):
    def run(workspace):
        raise error

    assert outcome(run, "train") == code
    assert capsys.readouterr().err == printed


def test_a_stage_gets_the_project_above_the_working_directory(project):
    seen = []
    assert outcome(seen.append, "train") == 0
    assert [workspace.root for workspace in seen] == [project]


def test_outside_a_project_a_stage_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert outcome(lambda workspace: None, "train") == 2
    assert "not inside a Darkroom project" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(project):
    def run(workspace):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outcome(run, "train")
