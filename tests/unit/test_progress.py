import pytest

from darkroom import progress as module
from darkroom.progress import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds_with_the_time_left(clock, capsys):
    with progress("training", 100, "steps") as advance:
        for step in range(1, 101):
            clock[0] += 1.0
            advance(step, f"loss {1 / step:.2f}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 1/100 steps  loss 1.00"
    assert lines[1] == "training: 6/100 steps, 1 min 34 s left  loss 0.17"
    assert lines[-1] == "training: 100/100 steps  loss 0.01"
    assert len(lines) == 1 + 19 + 1


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
