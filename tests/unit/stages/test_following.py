"""A stage gets SIGTERM when its DVC is gone, and waits for a trainer that is ending but not for one at work."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from darkroom.stages import following
from darkroom.training import checkpoints

# The stage notes its process id; on SIGTERM it takes a moment, as for saving, and says so.
STAGE = """
import pathlib, signal, sys, time
from darkroom.stages.following import follow
def stop(*_):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
time.sleep({late})
{lock}follow()
pathlib.Path("stage").touch()
time.sleep(60)
"""
LOCK = "from darkroom.training.checkpoints import locked; held = locked(pathlib.Path('.')); held.__enter__(); "
# As DVC does: its variable is in the environment of what it starts, a shell, not in its own.
DVC = """
import os, pathlib, subprocess, sys
stage = subprocess.Popen(sys.argv[1:], env=os.environ | {"DVC_STAGE": "train"})
pathlib.Path("pid").write_text(str(stage.pid))
stage.wait()
"""
SHELLS = {"exec": "exec {}", "shell": "{} && true", "two shells": "sh -c '{} && true' && true"}


def start(tmp_path: Path, shell: str = "shell", late: float = 0.0, lock: str = "") -> "subprocess.Popen[bytes]":
    """DVC, a shell and a stage."""
    (tmp_path / "stage.py").write_text(STAGE.format(late=late, lock=lock))
    command = SHELLS[shell].format(f"{sys.executable} stage.py")
    return subprocess.Popen([sys.executable, "-c", DVC, "/bin/sh", "-c", command], cwd=tmp_path, start_new_session=True)


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


def left(group: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter()
        if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group
    ]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_whose_dvc_is_killed_saves_and_ends(tmp_path, shell, number):
    dvc = start(tmp_path, shell)
    wait_for(tmp_path / "stage")
    dvc.send_signal(number)
    dvc.wait()
    wait_for(tmp_path / "saved", 5)
    deadline = time.monotonic() + 5
    while left(dvc.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_so_does_one_whose_dvc_was_killed_while_it_imported(tmp_path):
    dvc = start(tmp_path, late=1.0)
    wait_for(tmp_path / "pid")
    dvc.kill()
    dvc.wait()
    wait_for(tmp_path / "saved", 10)
    assert not (tmp_path / "stage").exists()


def test_a_stage_that_no_dvc_started_goes_on_when_its_parent_ends(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE.format(late=0, lock=""))
    parent = subprocess.Popen(["/bin/sh", "-c", f"{sys.executable} stage.py & wait"], cwd=tmp_path)
    wait_for(tmp_path / "stage")
    (stage,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    time.sleep(3 * following._EVERY)
    assert stage.is_running()
    stage.kill()
    assert not (tmp_path / "saved").exists()


def test_a_trainer_whose_dvc_is_gone_is_waited_for_and_a_line_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dvc = start(tmp_path, lock=LOCK)
    wait_for(tmp_path / "stage")
    trainer = int((tmp_path / "lock").read_text())
    dvc.kill()
    dvc.wait()
    following.wait_for_ending(tmp_path / "lock")
    assert (tmp_path / "saved").exists()
    assert caplog.messages == [
        f"waiting for process {trainer}, which trains this model: its DVC is gone, so it saves and ends"
    ]
    with checkpoints.locked(tmp_path):
        pass


def test_a_trainer_at_work_is_waited_for_in_case_it_is_ending_but_not_for_long(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(following, "_ENDING", 0.6)
    dvc = start(tmp_path, lock=LOCK)
    wait_for(tmp_path / "stage")
    began = time.monotonic()
    following.wait_for_ending(tmp_path / "lock")
    assert 0.6 <= time.monotonic() - began < 5
    assert caplog.messages[0].endswith("which trains this model: it may be ending")
    with pytest.raises(checkpoints.StageFailed, match="already training"), checkpoints.locked(tmp_path):
        pass
    os.killpg(dvc.pid, signal.SIGKILL)
    dvc.wait()


def test_a_lock_that_nobody_holds_costs_no_time(tmp_path, caplog):
    following.wait_for_ending(tmp_path / "lock")
    with checkpoints.locked(tmp_path):
        pass
    following.wait_for_ending(tmp_path / "lock")
    assert caplog.messages == []
