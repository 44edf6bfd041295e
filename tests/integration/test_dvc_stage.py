"""The DVC adapter against real DVC projects: order, outcomes, failures, and that nothing is ever left running."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from darkroom.errors import InputError, Interrupted, StageFailed
from flows import dvc_stage
from flows.dvc_stage import dvc, run_stage, stage_order

pytestmark = pytest.mark.usefixtures("warm")

Project = Callable[..., Path]

COPY = "open('{out}', 'w').write(open('{source}').read())"

# Like a trainer: has a child, saves for a second when it is asked to stop, and says more than fits in a pipe.
TRAINER = """
import pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
def stop(number, frame):
    time.sleep(1)
    pathlib.Path("saved").write_text("at step 7")
    print("x" * 200_000)
    print("train: saved at step 7")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("pids").write_text(f"{__import__('os').getpid()} {child.pid}")
time.sleep(300)
"""


def copying(source: str, out: str) -> tuple[str, dict[str, object]]:
    return COPY.format(source=source, out=out), {"deps": [source], "outs": [out]}


def wait_for(path: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_order_is_dvc_s_own(dvc_project: Project) -> None:
    root = dvc_project(
        last=copying("c", "d"),
        zeta=copying("a", "c"),
        alpha=copying("a", "b"),
        first=("open('a', 'w').write('1')", {"outs": ["a"]}),
    )
    assert stage_order(root) == re.findall(r"Running stage '(\w+)'", "\n".join(dvc(root, "repro")))
    assert stage_order(root)[0] == "first"


def test_order_and_names_do_not_depend_on_the_working_directory(
    dvc_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = dvc_project(first=("", {"outs": ["a"]}), second=copying("a", "b"))
    monkeypatch.chdir(tmp_path)
    assert stage_order(root) == ["first", "second"]


def test_a_pipeline_that_dvc_cannot_read_is_bad_input_in_one_line(dvc_project: Project) -> None:
    root = dvc_project(first=("", {"outs": ["same"]}), second=("", {"outs": ["same"]}))
    with pytest.raises(InputError, match="same") as caught:
        stage_order(root)
    assert "\n" not in str(caught.value)


def test_outcomes_are_told_apart(dvc_project: Project) -> None:
    root = dvc_project(copier=copying("a", "b"))
    outcomes = []
    for content in ("one", "one", "two", "one"):
        (root / "a").write_text(content)
        outcomes.append(run_stage(root, "copier").name)
        assert (root / "b").read_text() == content
    assert outcomes == ["Ran", "Cached", "Ran", "Restored"]
    assert run_stage(root, "copier", force=True).name == "Ran"


def test_only_the_named_stage_runs_with_this_interpreter(
    dvc_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impostor = tmp_path / "bin" / "python"
    impostor.parent.mkdir()
    impostor.write_text("#!/bin/sh\nexit 9\n")
    impostor.chmod(0o755)
    monkeypatch.setenv("PATH", f"{impostor.parent}{os.pathsep}{os.environ['PATH']}")
    root = dvc_project(
        first=("import sys; open('a', 'w').write(sys.executable)", {"outs": ["a"]}), second=copying("a", "b")
    )
    run_stage(root, "first")
    assert (root / "a").read_text() == sys.executable
    assert not (root / "b").exists()


def test_output_arrives_line_by_line_and_a_progress_bar_as_its_last_state(dvc_project: Project) -> None:
    source = "import sys; sys.stdout.write('10%\\r\\x1b[K55%\\r\\x1b[K100%\\nsecond\\n'); open('a', 'w').write('1')"
    root = dvc_project(bar=(source, {"outs": ["a"]}))
    lines: list[str] = []
    run_stage(root, "bar", log=lines.append)
    start = lines.index("> python bar.py")
    assert lines[start + 1 : start + 3] == ["100%", "second"]


def test_an_outcome_knows_the_stage_s_files_and_their_size(dvc_project: Project) -> None:
    source = "import pathlib; p = pathlib.Path('d'); p.mkdir(); [(p / n).write_text('12345') for n in 'ab']; "
    root = dvc_project(
        many=(f"{source}open('c', 'w').write('1' * 90)", {"outs": ["d"], "metrics": ["c"], "deps": ["many.py"]}),
        none=("print('nothing')", {"deps": ["none.py"]}),
    )
    for outcome in (run_stage(root, "many"), run_stage(root, "many")):
        assert (outcome.files, outcome.size) == (3, 100)
    outcome = run_stage(root, "none")
    assert (outcome.files, outcome.size) == (0, 0)


def test_a_stage_of_another_dvc_yaml_has_its_outputs_beside_that(dvc_project: Project) -> None:
    root = dvc_project(first=("open('a', 'w').write('1')", {"outs": ["a"]}))
    (root / "sub").mkdir()
    (root / "sub" / "dvc.yaml").write_text("stages: {second: {cmd: cp ../a b, deps: [../a], outs: [b]}}\n")
    assert stage_order(root) == ["first", "sub/dvc.yaml:second"]
    sizes = [run_stage(root, stage).size for stage in stage_order(root)]
    assert sizes == [1, 1]


@pytest.mark.usefixtures("cold")
def test_a_log_that_fails_ends_the_stage_instead_of_blocking_it(dvc_project: Project) -> None:
    root = dvc_project(chatty=("import time; print('x' * 300_000); time.sleep(300)", {"outs": ["a"]}))

    def full(line: str) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run_stage(root, "chatty", log=full)


def test_any_dvc_command_gives_its_lines_or_its_last_message(dvc_project: Project) -> None:
    root = dvc_project(first=("open('a', 'w').write('1')", {"outs": ["a"]}))
    assert "first" in " ".join(dvc(root, "stage", "list"))
    with pytest.raises(StageFailed, match=r"dvc push ended with \d+: .*no remote"):
        dvc(root, "push")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "import sys; print('bad: params.yaml: x = 1: want 2'); sys.exit(2)",
            InputError,
            "bad: params.yaml: x = 1",
        ),
        ("import sys; print('bad: saved at step 5'); sys.exit(75)", Interrupted, "bad: saved at step 5"),
        ("import sys; print('bad: accuracy 0.5: expected 0.97'); sys.exit(1)", StageFailed, "bad: accuracy 0.5"),
        ("1 / 0", StageFailed, r"bad failed \(exit code 1\): ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", StageFailed, r"bad failed \(killed by SIGKILL\)"),
        ("pass", StageFailed, "output 'out' does not exist"),
    ],
)
def test_a_failure_says_what_the_stage_said(
    dvc_project: Project, source: str, error: type[Exception], message: str
) -> None:
    root = dvc_project(bad=(source, {"outs": ["out"]}))
    with pytest.raises(error, match=message) as caught:
        run_stage(root, "bad")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cold")
def test_an_interruption_lets_the_stage_save_and_leaves_no_process(dvc_project: Project) -> None:
    root = dvc_project(train=(TRAINER, {"outs": ["model"]}))

    def interrupt() -> None:
        wait_for(root / "pids")
        os.kill(os.getpid(), signal.SIGINT)

    lines: list[str] = []
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_stage(root, "train", log=lines.append)
    assert (root / "saved").read_text() == "at step 7"
    assert "train: saved at step 7" in lines
    assert [pid for pid in map(int, (root / "pids").read_text().split()) if running(pid)] == []


@pytest.mark.usefixtures("cold")
def test_a_stage_that_does_not_stop_is_killed_after_the_grace_period(dvc_project: Project) -> None:
    deaf = TRAINER.replace("signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    root = dvc_project(train=(deaf, {"outs": ["model"]}))

    def interrupt() -> None:
        wait_for(root / "pids")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_stage(root, "train", grace=1)
    assert [pid for pid in map(int, (root / "pids").read_text().split()) if running(pid)] == []


@pytest.mark.usefixtures("cold")
def test_when_dvc_alone_is_killed_the_trainer_does_not_live_on(dvc_project: Project) -> None:
    root = dvc_project(train=(TRAINER, {"outs": ["model"]}))

    def kill_dvc() -> None:
        trainer = psutil.Process(int(wait_for(root / "pids").split()[0]))
        next(parent for parent in trainer.parents() if "dvc" in " ".join(parent.cmdline())).kill()

    threading.Thread(target=kill_dvc).start()
    with pytest.raises(StageFailed, match="DVC ended with -9"):
        run_stage(root, "train")
    assert (root / "saved").is_file()
    assert [pid for pid in map(int, (root / "pids").read_text().split()) if running(pid)] == []


@pytest.mark.usefixtures("cold")
def test_kill_9_of_the_flow_takes_the_stage_along(dvc_project: Project) -> None:
    root = dvc_project(train=(TRAINER, {"outs": ["model"]}))
    code = f"import pathlib; from flows.dvc_stage import run_stage; run_stage(pathlib.Path({str(root)!r}), 'train')"
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    pids = [int(pid) for pid in wait_for(root / "pids").split()]
    flow.kill()
    flow.wait()
    assert wait_for(root / "saved") == "at step 7"
    deadline = time.monotonic() + 20
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in pids if running(pid)] == []


@pytest.mark.usefixtures("cold")  # DVC's locks name processes by id and command line
def test_a_second_run_waits_for_the_first_instead_of_failing(dvc_project: Project) -> None:
    slow = "import time; time.sleep(3); open('a', 'w').write('1')"
    root = dvc_project(slow=(slow, {"outs": ["a"], "deps": ["slow.py"]}))
    outcomes: list[str] = []

    def run() -> None:
        outcomes.append(run_stage(root, "slow").name)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["Cached", "Ran"]


def busy_with(root: Path, pid: int, command: str) -> None:
    """As if DVC with this process id and command were writing the stage's output."""
    entry = {"pid": pid, "cmd": command}
    (root / ".dvc" / "tmp" / "rwlock").write_text(json.dumps({"write": {str(root / "a"): entry}, "read": {}}))


@pytest.fixture
def quick(dvc_project: Project) -> Path:
    return dvc_project(quick=("open('a', 'w').write('1')", {"outs": ["a"], "deps": ["quick.py"]}))


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of a process that has nothing to do with DVC."""
    process = subprocess.Popen(["sleep", "300"])
    yield process.pid
    process.kill()
    process.wait()


def test_what_a_killed_dvc_left_in_the_lock_does_not_block(quick: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    busy_with(quick, gone.pid, "/bin/dvc/__main__.py repro")
    assert run_stage(quick, "quick").name == "Ran"


def test_nor_if_another_process_has_got_its_id(quick: Path, stranger: int) -> None:
    busy_with(quick, stranger, "/bin/dvc/__main__.py repro")
    assert run_stage(quick, "quick").name == "Ran"


def test_nor_if_nobody_has_collected_the_dead_process(quick: Path) -> None:
    zombie = subprocess.Popen(["true"])
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    busy_with(quick, zombie.pid, "/bin/dvc/__main__.py repro")
    assert run_stage(quick, "quick").name == "Ran"
    zombie.wait()


def test_a_lock_that_dvc_cannot_read_is_removed(quick: Path) -> None:
    (quick / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"')
    lines: list[str] = []
    assert run_stage(quick, "quick", log=lines.append).name == "Ran"
    assert any("half-written" in line for line in lines)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("left", [0, 40])
def test_a_lock_file_that_was_cut_short_is_mended_and_nothing_runs_again(
    quick: Path, committed: bool, left: int
) -> None:
    run_stage(quick, "quick")
    whole = (quick / "dvc.lock").read_bytes()
    if committed:
        for command in (["git", "add", "-A"], ["git", "commit", "-qm", "done"]):
            subprocess.run(command, cwd=quick, check=True)
    (quick / "dvc.lock").write_bytes(whole[:left])
    lines: list[str] = []
    assert run_stage(quick, "quick", log=lines.append).name == ("Cached" if committed else "Restored")
    assert (quick / "dvc.lock").read_bytes() == whole
    assert any(line.startswith("WARNING: dvc.lock was cut short by a kill") for line in lines)
    (quick / "dvc.lock").write_bytes(whole[:left])
    assert stage_order(quick) == ["quick"]


def test_a_merge_that_is_not_finished_is_left_to_the_person(quick: Path) -> None:
    run_stage(quick, "quick")
    conflict = "<<<<<<< HEAD\n=======\n>>>>>>> other\n"
    (quick / "dvc.lock").write_text(conflict)
    with pytest.raises(StageFailed):
        run_stage(quick, "quick")
    assert (quick / "dvc.lock").read_text() == conflict


@pytest.mark.parametrize("lost", ["rwlock", "lock"])
def test_after_a_lock_was_lost_in_the_middle_the_next_run_ends_well(dvc_project: Project, lost: str) -> None:
    source = f"import pathlib; pathlib.Path('.dvc/tmp/{lost}').unlink(missing_ok=True); open('a', 'w').write('1')"
    root = dvc_project(stage=(source, {"outs": ["a"], "deps": ["stage.py"]}))
    with contextlib.suppress(StageFailed):
        run_stage(root, "stage")
    (root / "stage.py").write_text("open('a', 'w').write('2')")
    assert run_stage(root, "stage").name == "Ran"
    assert (root / "a").read_text() == "2"


@pytest.mark.usefixtures("cold")
def test_a_living_holder_is_waited_for_by_name_but_not_for_ever(
    quick: Path, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_with(quick, stranger, "/bin/dvc/__main__.py repro train 300")
    monkeypatch.setattr(dvc_stage, "LOCK_LIMIT", 3.0)
    monkeypatch.setattr(dvc_stage, "_SAY_EVERY", 1.0)
    lines: list[str] = []
    with pytest.raises(StageFailed, match=rf"waited .* for process {stranger} \(dvc repro train 300\)"):
        run_stage(quick, "quick", log=lines.append)
    assert any(line.startswith(f"Waiting for process {stranger} (dvc repro train 300)") for line in lines)


HOLD = """
import sys, time
from zc.lockfile import LockFile
lock = LockFile(sys.argv[1])
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize(("seconds", "ends"), [(6.0, "Ran"), (60.0, "waited")])
def test_whoever_holds_the_repository_is_named_while_dvc_waits_silently(
    quick: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, ends: str
) -> None:
    monkeypatch.setattr(dvc_stage, "LOCK_LIMIT", 60.0 if ends == "Ran" else 3.0)
    monkeypatch.setattr(dvc_stage, "_SAY_EVERY", 1.0)
    lock = str(quick / ".dvc" / "tmp" / "lock")
    with subprocess.Popen([sys.executable, "-c", HOLD, lock, str(seconds)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        lines: list[str] = []
        if ends == "Ran":
            assert run_stage(quick, "quick", log=lines.append).name == "Ran"
        else:
            with pytest.raises(StageFailed, match=rf"waited .* for process {holder.pid}"):
                run_stage(quick, "quick", log=lines.append)
        assert any(line.startswith(f"Waiting for process {holder.pid},") for line in lines)
        holder.kill()
