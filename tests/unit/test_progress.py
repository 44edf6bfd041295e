import time

import pytest

from darkroom import progress as module
from darkroom.progress import progress, signs_of_life


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds_with_the_time_left_from_the_first_one(clock, capsys):
    with progress("training", 100, "steps") as advance:
        for step in range(1, 101):
            clock[0] += 1.0
            advance(step, f"loss {1 / step:.2f}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: starting"
    assert lines[1] == "training: 1/100 steps, 1 min 39 s left  loss 1.00"
    assert lines[2] == "training: 6/100 steps, 1 min 34 s left  loss 0.17"
    assert lines[-1] == "training: 100/100 steps  loss 0.01"
    assert len(lines) == 1 + 1 + 19 + 1


def test_a_first_step_that_takes_long_counts_in_the_first_line_alone(clock, capsys):
    with progress("training", 100, "steps") as advance:
        clock[0] += 20.0
        advance(1)
        clock[0] += 10.0
        advance(11)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "training: 1/100 steps, 33 min 00 s left  0.05 steps/s",
        "training: 11/100 steps, 1 min 29 s left  1 steps/s",
    ]


def test_the_speed_is_measured_from_where_the_work_began_and_stands_in_for_a_note(clock, capsys):
    with progress("training", 100, "steps") as advance:
        clock[0] += 60.0  # imports
        advance.begin(80)
        clock[0] += 0.5
        advance(81)
    assert capsys.readouterr().out.splitlines()[1] == "training: 81/100 steps, 10 s left  2 steps/s"


def test_a_device_is_waited_for_when_a_line_is_due_and_never_else(clock, capsys):
    waited = []
    with progress("training", 1000, "steps", lambda: waited.append(clock[0])) as advance:
        for step in range(1, 1000):
            clock[0] += 0.01
            advance(step)
    assert waited == pytest.approx([100.01, 105.01])


def test_a_work_that_is_silent_says_every_few_seconds_that_it_goes_on(clock, capsys):
    pulse = module._Pulse("training: 3/1000 steps, 41 s left")
    for _ in range(17):
        clock[0] += 1.0
        pulse.beat()
    assert capsys.readouterr().out.splitlines() == [
        "training: 3/1000 steps, 41 s left",
        "training: 3/1000 steps, 41 s left  (8 s ago)",
        "training: 3/1000 steps, 41 s left  (16 s ago)",
    ]


@pytest.mark.parametrize("shown", [lambda: progress("training", 9, "steps"), lambda: signs_of_life("listing")])
def test_a_slow_step_still_gives_lines_and_none_after_the_end(shown, monkeypatch, capsys):
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    with shown():
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert lines[0].endswith(": starting")
    assert lines[1] == f"{lines[0]}  (0 s ago)"
    time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_progress_survives_a_reader_that_went_away(monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with progress("training", 2, "steps") as advance:
        advance(1)
        advance(2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (90_061, "25 h 01 min")]
)
def test_durations_read_well(seconds, text):
    assert module._duration(seconds) == text
