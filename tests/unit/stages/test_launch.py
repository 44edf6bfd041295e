"""A stage on two real ranks: however they end, it ends the same way, says it once and leaves nothing running."""

import os
import re
import signal
import socket
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.stages.launch import _raise_as, ranks_to_start, start_ranks
from tests.ranks import finish, project, running, start, wait_for

# Like the trainer: a signal asks it to stop, all ranks agree on it after a step, rank 0 takes a while to save.
TRAINER = """
stop = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
pathlib.Path(f"pid.{ranks.rank}").write_text(str(os.getpid()))
while not ranks.agree(stop.is_set()):
    time.sleep(0.01)
if ranks.is_first:
    time.sleep(1)
    pathlib.Path("saved").write_text("at step 7")
raise Interrupted("stopped at step 7, state saved")
"""
# Rank 1 is in the middle of a wait inside torch, where Python notices nothing.
WAITING = """
pathlib.Path(f"pid.{ranks.rank}").write_text(str(os.getpid()))
if ranks.is_first:
    time.sleep(300)
ranks.wait()
"""


def pids(root):
    return [int(wait_for(root / f"pid.{rank}")) for rank in (0, 1)]


def ended(ranks, seconds):
    deadline = time.monotonic() + seconds
    while any(map(running, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(running, ranks))


@pytest.mark.parametrize(
    ("stage", "code", "printed"),
    [
        pytest.param(
            'raise Interrupted("stopped at step 3")', 75, "stage: stopped at step 3\n", marks=pytest.mark.soak
        ),
        ('raise InputError("x = 1: bad\\ny = 2: bad")', 2, "stage: x = 1: bad\nstage: y = 2: bad\n"),
        ('if ranks.rank == 1: raise StageFailed("no disk")\nranks.wait()', 1, "stage: no disk\n"),
    ],
)
def test_exit_codes_survive_and_what_happened_is_said_once(tmp_path, stage, code, printed):
    process = start(project(tmp_path, f'print("on rank", ranks.rank)\n{stage}'))
    assert finish(process) == (code, "on rank 0\n", printed)


def test_a_defect_shows_its_traceback_once(tmp_path):
    code, _, err = finish(start(project(tmp_path, "ranks.wait()\n1 / 0")))
    assert code == 1
    assert err.count("Traceback") == err.count("    1 / 0") == 1
    assert re.search(r"^stage: rank [01]: ZeroDivisionError: division by zero$", err, re.MULTILINE)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_rank_that_is_killed_ends_the_others_at_once_and_is_named(tmp_path, victim):
    process = start(project(tmp_path, TRAINER))
    ranks = pids(tmp_path)
    os.kill(ranks[victim], signal.SIGKILL)
    assert ended(ranks, seconds=10)
    why = f"rank {victim} (process {ranks[victim]}) was killed by SIGKILL"
    said = f"stage: {why}, so the others were ended; the same command carries on\n"
    assert finish(process) == (1, "", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_signal_reaches_the_ranks_which_have_time_to_save(tmp_path, number):
    process = start(project(tmp_path, TRAINER))
    ranks = pids(tmp_path)
    process.send_signal(number)
    assert finish(process) == (75, "", "stage: stopped at step 7, state saved\n")
    assert (tmp_path / "saved").read_text() == "at step 7"
    assert not any(map(running, ranks))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_signal_ends_ranks_that_have_nothing_to_save(tmp_path, number):
    process = start(project(tmp_path, WAITING))
    ranks = pids(tmp_path)
    process.send_signal(number)
    assert finish(process, 20) == (130, "", "stage: interrupted; nothing half-written is left\n")
    assert not any(map(running, ranks))


def test_no_rank_survives_a_launcher_that_is_killed(tmp_path):
    process = start(project(tmp_path, WAITING))
    ranks = pids(tmp_path)
    process.kill()
    assert ended(ranks, seconds=10)
    finish(process)


def test_a_rank_that_never_joins_ends_those_that_wait_for_it(tmp_path):
    before = 'time.sleep(1)\n    if os.environ["RANK"] == "1": raise InputError("no GPU")'
    began = time.monotonic()
    assert finish(start(project(tmp_path, "ranks.wait()", before))) == (2, "", "stage: no GPU\n")
    assert time.monotonic() - began < 30  # after which the launcher would have killed it


def test_two_machines_meet_and_each_says_what_it_knows(tmp_path):
    """Two launchers with a rank each, as torchrun's own settings describe them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = {
        "DARKROOM_NPROC": "",
        "PET_NNODES": "2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": endpoint,
        "PET_RDZV_ID": "test",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    root = project(tmp_path, TRAINER)
    machines = [start(root, **meeting) for _ in range(2)]
    ranks = pids(root)
    os.kill(ranks[1], signal.SIGKILL)
    assert ended(ranks, seconds=10)
    endings = [finish(machine) for machine in machines]
    assert [(code, out, len(err.splitlines())) for code, out, err in endings] == [(1, "", 1)] * 2
    said = sorted(err for _, _, err in endings)
    assert said[0].startswith("stage: rank 0 of 2 lost another one: ")
    assert said[1].startswith(f"stage: rank 1 (process {ranks[1]}) was killed by SIGKILL")


def test_one_process_is_started_by_nothing_but_itself(tmp_path):
    stage = 'print(ranks.count, "torchrun" in str(sys.modules), "RANK" in os.environ)'
    assert finish(start(project(tmp_path, stage), DARKROOM_NPROC="1")) == (0, "1 False False\n", "")


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 0),
        ({"DARKROOM_NPROC": ""}, 0),
        ({"DARKROOM_NPROC": "1"}, 0),
        ({"DARKROOM_NPROC": "8"}, 8),
        ({"DARKROOM_NPROC": "8", "LOCAL_RANK": "3"}, 0),
        ({"PET_NNODES": "1"}, 0),
        ({"PET_NNODES": "4"}, 1),
        ({"DARKROOM_NPROC": "2", "PET_NNODES": "2:4"}, 2),
    ],
)
def test_the_environment_says_how_many_ranks(monkeypatch, environment, count):
    for name in ("LOCAL_RANK", "PET_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks_to_start() == count


@pytest.mark.parametrize("name", ["DARKROOM_NPROC", "PET_NNODES"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_a_number_of_ranks_that_is_none_is_bad_input(monkeypatch, name, value):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name} = '{re.escape(value)}': expected the number of"):
        ranks_to_start()


def test_a_setting_that_torchrun_refuses_is_bad_input(monkeypatch):
    monkeypatch.setenv("PET_MONITOR_INTERVAL", "often")
    with pytest.raises(InputError, match=r"torchrun refuses a PET_ variable: .*monitor-interval.*'often'"):
        start_ranks(2)


def failure(code, at=100, **said):
    """A rank that ended with `code` at second `at`."""
    failed = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="none")
    failed.timestamp, failed.error_file_data = at, said
    return failed


LOST = {"kind": "RankLost", "message": "lost another one"}


@pytest.mark.parametrize(
    ("failures", "stopped", "error", "message"),
    [
        ({0: failure(1, 99, **LOST), 1: failure(-9)}, False, StageFailed, "rank 1 .* killed by SIGKILL"),
        ({0: failure(-9, 130), 1: failure(1, 100, kind="StageFailed", message="why")}, False, StageFailed, "why"),
        ({0: failure(-15, 99), 1: failure(1, 100, **LOST)}, False, StageFailed, "lost another one"),
        ({0: failure(1, 99, **LOST), 1: failure(130)}, True, KeyboardInterrupt, None),
        ({0: failure(130, 99), 1: failure(75, kind="Interrupted", message="saved")}, True, Interrupted, "saved"),
        ({0: failure(7)}, False, StageFailed, "rank 0 ended with exit code 7"),
        ({0: failure(2)}, False, StageFailed, "rank 0 ended with exit code 2"),
    ],
)
def test_the_cause_is_told_from_what_followed_from_it(failures, stopped, error, message):
    with pytest.raises(error, match=message):
        _raise_as(failures, stopped)
