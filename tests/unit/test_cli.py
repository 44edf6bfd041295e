"""The command line: quick to explain itself, and one line for each thing that a person can put right."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from darkroom.cli import main
from tests.integration.registry_project import make_project


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "darkroom", *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_takes_half_a_second_and_names_every_command(tmp_path: Path) -> None:
    def once() -> float:
        started = time.monotonic()
        done = run("--help", cwd=tmp_path)
        assert done.returncode == 0
        for command in ("register", "promote", "rollback", "history", "status", "params"):
            assert command in done.stdout
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
