"""The command line: quick to explain itself, and one line for each thing that a person can put right."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from darkroom.cli import main
from darkroom.files import digest_file
from darkroom.workspace import Workspace
from tests.integration.registry_project import make_project, write_model


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "darkroom", *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_takes_half_a_second_and_names_every_command(tmp_path: Path) -> None:
    def once() -> float:
        started = time.monotonic()
        done = run("--help", cwd=tmp_path)
        assert done.returncode == 0
        for command in (
            *("register", "promote", "rollback", "history", "status", "lineage", "compare", "score", "checkout"),
            *("sample", "ema", "params", "data"),
        ):
            assert f"\n    {command} " in done.stdout
        return time.monotonic() - started

    assert min(once() for _ in range(5)) <= 0.5


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom darkroom.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'mlflow', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_params_says_ok_and_prints_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["params"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip().endswith("params.yaml: ok")
    with pytest.raises(SystemExit):
        main(["params", "--json"])
    assert json.loads(capsys.readouterr().out)["validate"]["max_undecodable"] == 0


@pytest.mark.parametrize(
    ("arguments", "change", "code", "words"),
    [
        (["params"], ("guidance_scale:", "guidance_scal:"), 2, 'did you mean "guidance_scale"'),
        (["register"], None, 2, "dvc repro"),
        (["promote", "--force"], None, 2, "--reason"),
        (["rollback", "--reason", " "], None, 2, "needs a reason"),
    ],
)
def test_what_a_person_can_put_right_is_a_line_without_a_traceback(
    tmp_path: Path, arguments: list[str], change: tuple[str, str] | None, code: int, words: str
) -> None:
    workspace = make_project(tmp_path)
    if change:
        workspace.params_file.write_text(workspace.params_file.read_text().replace(*change))
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert all(line.startswith("darkroom: ") for line in done.stderr.splitlines())
    assert done.stdout == ""


def test_outside_a_project_the_message_says_so(tmp_path: Path) -> None:
    done = run("status", cwd=tmp_path)
    assert done.returncode == 2
    assert "not inside a Darkroom project" in done.stderr


def test_sample_draws_what_was_asked_and_says_where(tmp_path: Path) -> None:
    write_model(make_project(tmp_path), 1)
    how = ["--sampler", "heun", "--steps", "4", "--guidance-scale", "1.5", "--class", "3", "7", "--num", "2", "--film"]
    done = run("sample", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "4 images in samples: grid.png, film.gif, film.png, samples.json and one file each"
    )
    assert "drawing: 4/4 steps" in done.stdout
    record = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert record["settings"] | {"sampler": "heun", "steps": 4, "guidance_scale": 1.5} == record["settings"]
    assert record["classes"] == ["3", "7", "3", "7"]
    done = run("sample", "--num", "1", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"directory": "samples", "files": ["grid.png", "samples.json"], "images": 10}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampler", "dpmp_2m"], 'did you mean "dpmpp_2m"?'),
        (["--steps", "0"], "steps = 0: expected at least 1"),
        (["--steps", "1001"], "steps = 1001: expected 1 to 1000"),
        (["--guidance-scale", "-1"], "guidance_scale = -1.0: expected at least 0"),
        (["--guidance-interval", "3", "1"], "guidance_interval = [3.0, 1.0]: expected [low, high]"),
        (["--precision", "fp16"], "fp16 overflows"),
        (["--class", "3", "eleven"], "class 'eleven': expected a name or a number from 0 to 9"),
        (["--num", "0"], "--num 0: expected 1 or more"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--out", "."], "holds files that are not an earlier draw's"),
        (["--model", "nowhere"], "nowhere/model.json: no such file"),
        (["--model", "models:/nobody@champion"], "models:/nobody@champion: "),
    ],
)
def test_sample_refuses_what_cannot_be_drawn_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    write_model(make_project(tmp_path), 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["sample", *arguments])
    assert done.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def write_snapshots(workspace: Workspace) -> None:
    """What a training with snapshots leaves beside its model."""
    import torch

    from darkroom.diffusion.model import DiffusionModel
    from darkroom.training.ema import PowerEMA
    from darkroom.training.snapshots import write_snapshot

    model = DiffusionModel.load(workspace.models)
    ema = PowerEMA(model.network)
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.mul_(1.01)
        ema.update(model.network, step)
        if step % 2 == 0:
            write_snapshot(workspace.models, step, ema, model.card.fingerprint)


def test_ema_makes_a_model_that_sample_draws_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_project(tmp_path)
    write_model(workspace, 1)
    write_snapshots(workspace)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["ema", "--width", "0.08"])
    assert done.value.code == 0
    digest = digest_file(workspace.models / "ema-0.080" / "ema.safetensors")
    *_, progress, made, residual, advice = capsys.readouterr().out.splitlines()
    assert "averaging: 8/8 snapshots" in progress
    assert made == f"width 0.080 after step 8: weights {digest[:12]} in models/ema-0.080"
    assert residual.startswith("residual 0.03")
    assert advice == "look at it:  darkroom sample --model models/ema-0.080"
    with pytest.raises(SystemExit) as done:
        main([*advice.split()[4:], "--num", "1", "--class", "3"])
    assert done.value.code == 0
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["weights_digest"] == digest


def test_ema_of_a_step_goes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_project(tmp_path)
    write_model(workspace, 1)
    write_snapshots(workspace)
    monkeypatch.chdir(tmp_path)
    for output, expected in (
        ([], str(workspace.models / "ema-0.100-step-6")),
        (["--output", "elsewhere"], "elsewhere"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["ema", "--width", "0.1", "--step", "6", "--json", *output])
        assert done.value.code == 0
        printed = json.loads(capsys.readouterr().out)
        digest = digest_file(Path(expected) / "ema.safetensors")
        assert printed == {
            "directory": expected,
            "residual": pytest.approx(0, abs=1e-6),
            "step": 6,
            "weights_digest": digest,
            "width": 0.1,
        }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "0"], "EMA width 0.0: expected more than 0 and at most 0.25"),
        (["--width", "nan"], "EMA width nan: expected more than 0 and at most 0.25"),
        (["--width", "0.001"], "make it only with a residual of "),
        (["--width", "0.08", "--step", "1"], "step 1: expected 2 to 8, the first and the last snapshot's"),
        (["--width", "0.08", "--output", "."], "holds files that are not an earlier reconstruction's"),
        (["--width", "wide"], "invalid float value: 'wide'"),
        ([], "the following arguments are required: --width"),
    ],
)
def test_ema_refuses_what_cannot_be_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    workspace = make_project(tmp_path)
    write_model(workspace, 1)
    write_snapshots(workspace)
    workspace.state.mkdir()  # every command makes it
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["ema", *arguments])
    assert done.value.code == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_ema_without_snapshots_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(make_project(tmp_path), 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["ema", "--width", "0.08"])
    assert done.value.code == 2
    assert capsys.readouterr().err == (
        f"darkroom: {tmp_path / 'models' / 'snapshots'}: holds no snapshots; set train.ema_snapshots above 0 and run"
        " `dvc repro`, or `dvc checkout`\n"
    )
