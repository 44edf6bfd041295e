"""What a registered version has to do in a clean process before it may serve."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from darkroom.errors import InputError, StageFailed
from darkroom.registry import proof
from darkroom.registry.proof import prove
from darkroom.registry.versions import WEIGHTS_TAG, score_tag
from darkroom.workspace import Workspace

WEIGHTS, PROTOCOL = "a" * 64, "b" * 64

GOOD: dict[str, Any] = {
    "metadata": {"weights_digest": WEIGHTS, "protocol_digest": PROTOCOL},
    "weights_digest": WEIGHTS,
    "code": "/elsewhere/darkroom/__init__.py",
    "distinct": 2,
    "seconds_per_image": 0.25,
}


def version(**tags: str) -> Any:
    return SimpleNamespace(name="digits", version="3", tags={WEIGHTS_TAG: WEIGHTS, score_tag(PROTOCOL): "{}"} | tags)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the clean process end with a result or an error."""

    def set_answer(found: dict[str, Any] | None, stderr: str = "", code: int = 0) -> None:
        out = f"warnings of others\n{json.dumps(found)}\n" if found is not None else ""
        done = subprocess.CompletedProcess([], code, stdout=out, stderr=stderr)
        monkeypatch.setattr(proof.subprocess, "run", lambda *_, **__: done)

    return set_answer


def test_a_version_that_works_is_timed(answer: Any, tmp_path: Path) -> None:
    answer(GOOD)
    assert prove(Workspace(tmp_path), version(), 1.0).seconds_per_image == 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights_digest": "c" * 64}, "loads other weights than its tag says (cccccccccccc instead of aaaaaaaaaaaa)"),
        (
            {"metadata": {"weights_digest": "c" * 64, "protocol_digest": PROTOCOL}},
            "states other weights than its tag says (cccccccccccc instead of aaaaaaaaaaaa)",
        ),
        (
            {"metadata": {"weights_digest": WEIGHTS, "protocol_digest": "c" * 64}},
            "states that it was scored under protocol cccccccccccc, and its tags have no such score",
        ),
        ({"code": proof.__file__}, "runs this project's code instead of its own"),
        ({"distinct": 1}, "draws the same image twice"),
    ],
)
def test_what_speaks_against_a_version_is_said(answer: Any, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    answer(GOOD | change)
    with pytest.raises(StageFailed) as error:
        prove(Workspace(tmp_path), version(), 1.0)
    assert str(error.value) == f"models:/digits/3 {words}; the aliases are as before"


def test_a_package_that_states_nothing_is_judged_by_what_it_loads(answer: Any, tmp_path: Path) -> None:
    answer(GOOD | {"metadata": {"weights_digest": None, "protocol_digest": None}})
    assert prove(Workspace(tmp_path), version(), 1.0)


@pytest.mark.parametrize(
    ("stderr", "code", "words"),
    [
        (
            "Traceback\nFloatingPointError: not finite at timestep 7\n",
            1,
            "FloatingPointError: not finite at timestep 7",
        ),
        ("", -9, "it ended with -9"),
    ],
)
def test_a_process_that_fails_is_told_by_its_last_line(
    answer: Any, tmp_path: Path, stderr: str, code: int, words: str
) -> None:
    answer(None, stderr, code)
    with pytest.raises(StageFailed) as error:
        prove(Workspace(tmp_path), version(), 1.0)
    assert str(error.value) == f"models:/digits/3 does not work when loaded ({words}); the aliases are as before"


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = []

    def run(*_: Any, timeout: float, **__: Any) -> None:
        limits.append(timeout)
        raise subprocess.TimeoutExpired(sys.executable, timeout)

    monkeypatch.setattr(proof.subprocess, "run", run)
    with pytest.raises(StageFailed, match=r"did not load and draw within \d+ s; the aliases are as before"):
        prove(Workspace(tmp_path), version(), 50.0)
    assert limits[0] > 6 * 50


def test_a_version_that_darkroom_did_not_register_is_refused(tmp_path: Path) -> None:
    stranger = SimpleNamespace(name="digits", version="3", tags={})
    with pytest.raises(InputError, match=r"models:/digits/3 has no tag darkroom\.weights"):
        prove(Workspace(tmp_path), stranger, 1.0)  # type: ignore[arg-type]
