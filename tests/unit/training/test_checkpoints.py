import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom.errors import StageFailed
from darkroom.files import digest_file, read_json, write_json
from darkroom.training import checkpoints
from darkroom.training.checkpoints import Checkpoint, Saver, Schedule, load_newest, locked, save
from darkroom.training.hostcopy import HostCopy
from tests.unit.training.small import FINGERPRINT


def state(step):
    return {"raw.x": torch.full((3,), float(step)), "optimizer.step.x": torch.tensor(float(step))}


def write(directory, *steps):
    for step in steps:
        save(directory, Checkpoint(step, state(step)), FINGERPRINT, keep=9)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != "lock")


def files_of(*steps):
    return [f"step-{step:09d}.{ending}" for step in steps for ending in ("json", "safetensors")]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Held:
    """Holds up every write of tensors until `go`."""

    def __init__(self, monkeypatch):
        self.reached, self.go = threading.Event(), threading.Event()
        original = HostCopy.write

        def held(host, path):
            self.reached.set()
            assert self.go.wait(20)
            return original(host, path)

        monkeypatch.setattr(HostCopy, "write", held)


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.go.set()


@contextmanager
def unprivileged(directory):
    """Work in `directory` as somebody who is not root; root can read everything."""
    before = Path.cwd()
    os.chdir(directory)
    user = os.geteuid()
    try:
        if user == 0:
            directory.chmod(0o755)
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        os.chdir(before)


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=120
    )


# What is written


def test_the_file_is_what_safetensors_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "odd bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 5, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "integers": torch.arange(-3, 3),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "needs a gradient": torch.nn.Parameter(torch.randn(300, 300, generator=generator)),
        'a name with " and é': torch.ones(1),
    }
    host = HostCopy()
    host.take(tensors)
    size, digest = host.write(tmp_path / "file")
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert size == (tmp_path / "file").stat().st_size
    assert digest == digest_file(tmp_path / "file")


def test_equal_states_make_equal_files(tmp_path):
    for name, order in (("a", 1), ("b", -1)):
        save(tmp_path / name, Checkpoint(4, dict(list(state(4).items())[::order])), FINGERPRINT)
    assert {digest_file(tmp_path / name / files_of(4)[1]) for name in "ab"} == {
        read_json(tmp_path / "a" / files_of(4)[0])["sha256"]
    }


def test_memory_is_used_again_while_shapes_stay(tmp_path):
    saver = Saver(tmp_path, FINGERPRINT)
    places = []
    for step, size in ((1, 3), (2, 3), (3, 1000)):
        saver.save(step, {"x": torch.full((size,), float(step))}, wait=True)
        places.append(saver._state.tensors["x"].data_ptr())
        assert load_newest(tmp_path, FINGERPRINT).tensors["x"].tolist() == [step] * size
    assert places[0] == places[1]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, Checkpoint(step, state(step)), FINGERPRINT)
    assert names(tmp_path) == files_of(4, 5)
    saver = Saver(tmp_path, FINGERPRINT, keep=3)
    for step in range(6, 10):
        saver.save(step, state(step), wait=True)
    assert names(tmp_path) == files_of(7, 8, 9)
    with pytest.raises(ValueError, match="keep = 0"):
        Saver(tmp_path, FINGERPRINT, keep=0)


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    write(tmp_path, 4, 8)
    damage(tmp_path / files_of(8)[1])
    Saver(tmp_path, FINGERPRINT, keep=2).save(12, state(12), wait=True)
    assert names(tmp_path) == files_of(4, 12)


def test_what_a_killed_or_full_disk_left_never_counts_as_newest(tmp_path):
    save(tmp_path, Checkpoint(4, state(4)), FINGERPRINT)
    for step in (8, 9):  # without vouchers, as after a kill between the two files
        save_file({"x": torch.zeros(1)}, tmp_path / f"step-{step:09d}.safetensors")
    save(tmp_path, Checkpoint(6, state(6)), FINGERPRINT)
    assert load_newest(tmp_path, FINGERPRINT).step == 6
    assert names(tmp_path) == files_of(4, 6)


def test_steps_are_ordered_as_numbers(tmp_path):
    write(tmp_path, 999_999_999, 1_000_000_000)
    assert load_newest(tmp_path, FINGERPRINT).step == 1_000_000_000


# What is read


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def change_voucher(**changes):
    def change(path):
        voucher = path.with_suffix(".json")
        write_json(voucher, read_json(voucher) | changes)

    return change


def vouch_for_nonsense(path):
    path.write_bytes(b"no tensors")
    change_voucher(sha256=digest_file(path), bytes=10)(path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, r"it is truncated \([\d,]+ of [\d,]+ bytes\)"),
        (damage, r"it was changed after it was written \(sha256 [0-9a-f]{12}, not [0-9a-f]{12}\)"),
        (Path.unlink, r"step-000000008.safetensors is missing; a kill or a full disk cut its writing short"),
        (lambda path: path.with_suffix(".json").unlink(), r"step-000000008.json is missing; a kill"),
        (
            lambda path: path.with_suffix(".json").write_text('{"step": 8'),
            r"its voucher step-000000008.json is damaged",
        ),
        (lambda path: path.with_suffix(".json").write_text("[]"), r"its voucher step-000000008.json is damaged"),
        (change_voucher(bytes="many"), r"its voucher step-000000008.json is damaged"),
        (change_voucher(step=9), r"its voucher step-000000008.json is of step 9"),
        (change_voucher(fingerprint="e" * 64), r"another training \(fingerprint e{12}, this one's is f{12}\)"),
        (change_voucher(fingerprint=None), r"another training \(fingerprint None, this one's is f{12}\)"),
        (vouch_for_nonsense, r"it cannot be loaded \("),
        (lambda path: (path.unlink(), path.mkdir()), r"step-000000008.safetensors cannot be read \(Is a directory\)"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_with_one_line_that_says_why(tmp_path, caplog, harm, reason):
    write(tmp_path, 4, 8)
    harm(tmp_path / "step-000000008.safetensors")
    found = load_newest(tmp_path, FINGERPRINT)
    assert found.step == 4
    assert torch.equal(found.tensors["raw.x"], torch.full((3,), 4.0))
    (line,) = caplog.messages
    assert line.startswith("checkpoint step-000000008.safetensors is passed over: ")
    assert "\n" not in line
    assert re.search(reason, line), line


@pytest.mark.parametrize("file", files_of(8))
def test_a_checkpoint_that_may_not_be_read_is_passed_over(tmp_path, caplog, file):
    write(tmp_path / "checkpoints", 4, 8)
    (tmp_path / "checkpoints" / file).chmod(0)
    with unprivileged(tmp_path):
        assert load_newest(Path("checkpoints"), FINGERPRINT).step == 4
    assert caplog.messages == [f"checkpoint {files_of(8)[1]} is passed over: {file} cannot be read (Permission denied)"]


def test_without_any_whole_checkpoint_training_starts_anew_and_says_so(tmp_path, caplog):
    assert load_newest(tmp_path / "nowhere", FINGERPRINT) is None
    assert caplog.messages == []
    save(tmp_path, Checkpoint(4, state(4)), "another")
    assert load_newest(tmp_path, FINGERPRINT) is None
    assert "belongs to another training" in caplog.messages[0]
    assert caplog.messages[1:] == [f"there is no whole checkpoint of this training in {tmp_path}; it starts at step 0"]


# The lock


def test_what_a_kill_left_half_written_is_removed_by_the_next_trainer(tmp_path):
    left = tmp_path / ".step-000000008.safetensors.abc.tmp"
    left.write_bytes(b"half")
    (tmp_path / ".pull.abc.tmp").mkdir()
    (tmp_path / ".pull.abc.tmp" / "half").touch()
    with locked(tmp_path):
        assert names(tmp_path) == []


def test_a_second_trainer_is_refused_by_the_process_number_of_the_first(tmp_path):
    script = "import sys; from pathlib import Path; from darkroom.training.checkpoints import locked\n"
    with locked(tmp_path):
        second = run(f"{script}with locked(Path(sys.argv[1])): pass", tmp_path)
        with pytest.raises(StageFailed, match=f"process {os.getpid()} is already training"), locked(tmp_path):
            pass
    assert f"process {os.getpid()} is already training this model" in second.stderr
    with locked(tmp_path):
        pass


def test_a_child_that_outlives_a_killed_trainer_does_not_hold_its_lock(tmp_path):
    script = (
        "import os, signal, sys, time; from pathlib import Path; from darkroom.training.checkpoints import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(1); os.close(2); time.sleep(60); os._exit(0)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = run(script, tmp_path)
    child = int(killed.stdout)
    try:
        deadline = time.monotonic() + 10  # the child may not have come to close its copy yet
        while True:
            try:
                with locked(tmp_path):
                    break
            except StageFailed:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_that_cannot_be_written_to_is_refused_in_one_line(tmp_path, there):
    if there:
        with locked(tmp_path / "checkpoints"):
            pass
        (tmp_path / "checkpoints" / "lock").chmod(0o666)
        (tmp_path / "checkpoints").chmod(0o555)
    with unprivileged(tmp_path), pytest.raises(StageFailed) as error, locked(Path("checkpoints")):
        pass
    assert str(error.value) == (
        "checkpoints cannot be written to checkpoints: Permission denied; it has to be writable and to have room for"
        " them, or DARKROOM_STATE has to name another place"
    )


def test_a_disk_that_is_full_at_the_start_is_refused_in_one_line(tmp_path):
    script = (
        "import resource, sys; from pathlib import Path; from darkroom.training.checkpoints import locked\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with locked(Path(sys.argv[1])): print('locked')"
    )
    last = run(script, tmp_path).stderr.splitlines()[-1]
    assert last.startswith(
        f"darkroom.errors.StageFailed: checkpoints cannot be written to {tmp_path}: File too large; "
    )


# Saving beside the training


def test_a_save_returns_while_its_file_is_being_written_and_has_the_state_of_its_step(tmp_path, held):
    saver, tensors = Saver(tmp_path, FINGERPRINT), state(4)
    saver.save(4, tensors)
    assert held.reached.wait(20)
    tensors["raw.x"].fill_(9)  # training goes on
    assert load_newest(tmp_path, FINGERPRINT) is None
    assert 0 < saver.seconds_of_last < 10
    held.go.set()
    saver.close()
    assert load_newest(tmp_path, FINGERPRINT).tensors["raw.x"].tolist() == [4, 4, 4]


def test_a_save_waits_for_the_one_before(tmp_path, held):
    saver = Saver(tmp_path, FINGERPRINT)
    saver.save(4, state(4))
    timer = threading.Timer(0.3, held.go.set)
    timer.start()
    saver.save(5, state(5))
    assert saver.seconds_of_last > 0.2
    assert load_newest(tmp_path, FINGERPRINT).step in (4, 5)
    saver.close()
    assert load_newest(tmp_path, FINGERPRINT).step == 5
    assert names(tmp_path) == files_of(4, 5)


def test_with_wait_the_checkpoint_is_there_on_return(tmp_path):
    saver = Saver(tmp_path, FINGERPRINT)
    saver.save(4, state(4))
    saver.save(5, state(5), wait=True)
    assert load_newest(tmp_path, FINGERPRINT).step == 5


def test_a_step_that_is_saved_is_not_saved_again(tmp_path, monkeypatch):
    saver = Saver(tmp_path, FINGERPRINT)
    saver.save(4, state(4))
    saver.close()
    monkeypatch.setattr(HostCopy, "write", full)
    saver.save(4, state(4), wait=True)


@pytest.mark.parametrize("place", ["tensors", "voucher"])
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path, monkeypatch, caplog, place):
    write(tmp_path, 4)
    before = {path.name: digest_file(path) for path in tmp_path.iterdir()}
    saver = Saver(tmp_path, FINGERPRINT)
    with monkeypatch.context() as patch:
        patch.setattr(*((HostCopy, "write") if place == "tensors" else (checkpoints, "write_json")), full)
        saver.save(5, state(5))
        saver.close()
        assert caplog.messages == [
            f"checkpoint of step 5 could not be written to {tmp_path}: No space left on device;"
            " the one of step 4 is intact; training goes on, the next save tries again"
        ]
        with pytest.raises(StageFailed, match=r"step 6 could not be .*: No space left on device; the one of step 4 is"):
            saver.save(6, state(6), wait=True)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, Checkpoint(7, state(7)), FINGERPRINT)
        assert {path.name: digest_file(path) for path in tmp_path.iterdir()} == before
    saver.save(8, state(8))
    saver.close()
    assert names(tmp_path) == files_of(4, 8)


def test_a_disk_that_becomes_full_while_a_file_is_written(tmp_path):
    script = (
        "import logging, resource, sys, torch; from pathlib import Path\n"
        "from darkroom.training.checkpoints import Saver\n"
        "logging.basicConfig(format='%(message)s', stream=sys.stdout)\n"
        "saver = Saver(Path(sys.argv[1]), 'f' * 64)\n"
        "saver.save(1, {'x': torch.ones(1000)}, wait=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
        "saver.save(2, {'x': torch.ones(1_000_000)})\n"
        "saver.close()\n"
        "saver.save(3, {'x': torch.ones(1000)})\n"
        "saver.close()\n"
    )
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"checkpoint of step 2 could not be written to {tmp_path}: File too large; the one of step 1 is intact;"
        " training goes on, the next save tries again\n"
    )
    assert names(tmp_path) == files_of(1, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_never_written(tmp_path, value):
    saver = Saver(tmp_path, FINGERPRINT)
    saver.save(4, state(4), wait=True)
    bad = torch.zeros(40_000)
    bad[33_333] = value
    saver.save(5, state(5) | {"ema.y": bad})
    with pytest.raises(StageFailed, match=r"ema.y is not finite after step 5.*train.learning_rate.*is kept in"):
        saver.save(6, state(6))
    with pytest.raises(StageFailed, match=r"ema.y is not finite after step 7"):
        saver.save(7, {"ema.y": bad}, wait=True)
    assert names(tmp_path) == files_of(4)


def test_the_largest_numbers_are_finite(tmp_path):
    largest = {
        str(dtype): torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.float64)
    }
    save(tmp_path, Checkpoint(4, largest), FINGERPRINT)
    assert load_newest(tmp_path, FINGERPRINT).step == 4


def test_a_problem_that_no_later_save_raises_is_logged_at_the_end(tmp_path, caplog):
    saver = Saver(tmp_path, FINGERPRINT)
    saver.save(5, {"raw.x": torch.tensor([float("nan")])})
    saver.close()
    assert "raw.x is not finite after step 5" in caplog.text


def test_a_defect_in_the_writer_reaches_the_training(tmp_path, monkeypatch):
    saver = Saver(tmp_path, FINGERPRINT)
    monkeypatch.setattr(HostCopy, "write", lambda *_: 1 / 0)
    saver.save(5, state(5))
    with pytest.raises(ZeroDivisionError):
        saver.save(6, state(6))


def test_a_process_that_ends_without_closing_still_finishes_its_checkpoint(tmp_path):
    script = (
        "import sys, time, torch; from pathlib import Path; from darkroom.training.checkpoints import Saver\n"
        "from darkroom.training.hostcopy import HostCopy\n"
        "write = HostCopy.write\n"
        "HostCopy.write = lambda *arguments: (time.sleep(0.3), write(*arguments))[1]\n"
        "Saver(Path(sys.argv[1]), 'f' * 64).save(4, {'x': torch.ones(3)})\n"
        "raise SystemExit(3)"
    )
    assert run(script, tmp_path).returncode == 3
    assert load_newest(tmp_path, FINGERPRINT).step == 4


KILLS = 60
SAVE_IN_A_LOOP = """
import itertools, os, random, signal, sys, time, torch
from pathlib import Path
from darkroom.training.checkpoints import Saver, load_newest, locked

directory, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(directory):
            newest = load_newest(directory, "f" * 64)
            saver = Saver(directory, "f" * 64)
            for step in itertools.count(newest.step + 1 if newest else 1):
                saver.save(step, {f"x{i}": torch.full((50_000,), float(step + i)) for i in range(4)})
                os.write(writer, b"%d\\n" % (step - 1))  # the save before is whole when the next one returns
    time.sleep(random.uniform(0.005, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = [int(line) for line in file.read().split()]
    left = [p.name for p in directory.iterdir() if p.name.startswith(".")]
    newest = load_newest(directory, "f" * 64)
    step = newest.step if newest else 0
    equal = not newest or all(bool((newest.tensors[f"x{i}"] == step + i).all()) for i in range(4))
    print(said[-1] if said else 0, step, int(equal), len(left))
"""


def test_a_kill_at_any_moment_of_saving_leaves_the_newest_checkpoint_whole(tmp_path):
    done = run(SAVE_IN_A_LOOP, tmp_path, KILLS)
    assert done.returncode == 0, done.stderr
    rounds = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rounds) == KILLS
    before = 0
    for said, step, equal, _ in rounds:
        assert equal
        assert step >= max(said, before)  # nothing that was acknowledged is lost
        before = step
    assert before > 10
    assert sum(left for *_, left in rounds) > 3  # the kills did hit writes


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_through_pinned_memory(tmp_path, gpu):
    saver = Saver(tmp_path, FINGERPRINT)
    x = torch.randn(4, 3, 8, 8, device=gpu).to(memory_format=torch.channels_last)
    kept = x.cpu().clone()
    saver.save(4, {"x": x, "cpu": torch.arange(3)})
    assert saver._state.tensors["x"].is_pinned() == (gpu.type == "cuda")
    x.zero_()
    saver.close()
    found = load_newest(tmp_path, FINGERPRINT).tensors
    assert torch.equal(found["x"], kept)
    assert found["cpu"].tolist() == [0, 1, 2]


# When


def test_saves_are_due_by_time_and_by_steps():
    schedule = Schedule(step=100, now=1000.0, every_seconds=30.0, every_steps=50)
    assert not schedule.due(149, 1029.9)
    assert schedule.due(150, 1001.0)
    assert schedule.due(101, 1030.0)
    assert not schedule.due(100, 5000.0)  # nothing new
    schedule.saved(150, 1001.0, 0.0)
    assert not schedule.due(199, 1030.9)
    assert schedule.due(200, 1002.0)


def test_saving_takes_at_most_its_share_of_the_time():
    schedule = Schedule(step=0, now=0.0, every_seconds=1.0)
    clock, saving, step = 0.0, 0.0, 0
    costs = random.Random(0)
    while clock < 10_000:
        clock, step = clock + 0.5, step + 1
        if schedule.due(step, clock):
            cost = costs.uniform(0.0, 2.0)
            clock, saving = clock + cost, saving + cost
            schedule.saved(step, clock, cost)
    assert 0.005 < saving / clock <= 0.0101
    assert Schedule(step=0, now=0.0, every_seconds=0.0, cost=1e9, pause=2e-9).due(1, 1.0)


def test_steps_that_were_asked_for_are_kept_whatever_they_cost():
    schedule = Schedule(step=0, now=0.0, every_seconds=1.0, every_steps=50)
    schedule.saved(50, 100.0, 10.0)
    assert not schedule.due(99, 1099.9)
    assert schedule.due(99, 1100.0)
    assert schedule.due(100, 100.1)


def test_without_steps_only_time_counts():
    schedule = Schedule(step=0, now=0.0, every_seconds=30.0)
    assert not schedule.due(10**9, 29.0)
    assert schedule.due(1, 30.0)
