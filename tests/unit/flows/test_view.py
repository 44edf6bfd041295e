"""The live view of a run."""

import io
import logging
import os

import pytest
from prefect.states import Completed, Failed
from rich.console import Console

from flows import view as module
from flows.view import View, view, watched

PARTS = ("prepare", "train", "promote")


@pytest.fixture
def output(monkeypatch):
    """What a terminal of the width `output.width` would show."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    return io.StringIO()


def made(output, width=110):
    console = Console(file=output, force_terminal=True, width=width, height=35, color_system=None)
    return View("retrain", PARTS, ".darkroom/logs/a.log", console), console


def record(text, level=logging.INFO, path=module.__file__):
    return logging.LogRecord("prefect.task_runs", level, path, 1, text, (), None)


def text_of(shown, console, output):
    output.seek(0)
    output.truncate()
    console.print(shown)
    return output.getvalue()


def test_parts_have_their_state_and_the_running_one_its_bar_and_figures(output):
    shown, console = made(output)
    shown.started("prepare")
    shown.ended("prepare", "cached")
    shown.started("train")
    shown.emit(record("training: starting"))
    assert "training: starting" in text_of(shown, console, output)
    shown.emit(record("training: 250/1000 steps, 41 s left  loss 0.1234  812 images/s"))
    shown.emit(record("a remark"))
    lines = text_of(shown, console, output).splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["prepare"].split()[1] == "cached"
    assert rows["train"].split()[1] == "running"
    assert "━" in rows["train"]
    assert "250/1000 steps, 41 s left" in rows["train"]
    assert rows["loss"].split() == ["loss", "0.1234", "812", "images/s"]
    assert rows["promote"].split() == ["promote", "waiting"]
    assert ".darkroom/logs/a.log" in lines[-1]


@pytest.mark.parametrize(("seconds", "text"), [(3.25, "3.2 s"), (59.9, "1:00 min"), (179.7, "3:00 min")])
def test_times_read_well(seconds, text):
    assert module._clock(seconds) == text


@pytest.mark.parametrize("width", [10, 20, 40, 79, 300])
def test_it_fits_any_width(output, width):
    shown, console = made(output, width)
    shown.started("train")
    shown.emit(record("training: 250/1000 steps, 41 s left  loss 0.1234  812 images/s"))
    assert all(len(line) <= width for line in text_of(shown, console, output).splitlines())


def test_warnings_of_stages_are_printed_and_what_prefect_says_is_not(output):
    shown, _ = made(output)
    shown.started("train")
    shown.emit(record("WARNING: [bold] stays as it is", logging.WARNING))
    shown.emit(record("Finished in state Failed", logging.ERROR, "prefect/task_engine.py"))
    assert "WARNING: [bold] stays as it is" in output.getvalue()
    assert "Finished" not in output.getvalue()


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (Completed(name="Restored", message="1.5 s, the words"), "restored"),
        (Failed(name="BadInput", message="the words\nand more"), "failed"),
        (Failed(name="Interrupted", message="the words"), "interrupted"),
    ],
)
def test_a_part_is_watched_from_its_start_to_its_state(output, monkeypatch, state, word):
    shown, console = made(output)
    monkeypatch.setattr(module, "_current", shown)
    assert watched("train", lambda: state) is state
    shown.close_rows()
    rows = {line.split()[0]: line.split() for line in text_of(shown, console, output).splitlines() if line}
    assert rows["train"][1] == word
    assert rows["train"][-2:] == ["the", "words"]
    assert rows["promote"] == ["promote", "not", "run"]


def test_ctrl_c_is_passed_on_and_shown(output, monkeypatch):
    shown, console = made(output)
    monkeypatch.setattr(module, "_current", shown)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched("train", interrupted)
    assert "interrupted" in text_of(shown, console, output)


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_without_a_terminal_nothing_changes(tmp_path, monkeypatch, capsys, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout.isatty", lambda: term == "dumb")
    with view("retrain", PARTS, tmp_path) as log:
        assert log is None
        state = Completed()
        assert watched("train", lambda: state) is state
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_logs_go_to_a_file_of_which_the_newest_ten_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for age in range(12):
        old = tmp_path / f"retrain-{age}.log"
        old.touch()
        os.utime(old, (1e9 - age, 1e9 - age))
    logger = logging.getLogger("prefect.flow_runs")
    before = logging.root.handlers[:]
    with view("retrain", PARTS, tmp_path) as log:
        logger.warning("only in the file")
        logging.getLogger("another").warning("and this")
    assert log is not None
    assert [line.split(maxsplit=3)[2:] for line in log.read_text().splitlines()] == [
        ["WARNING", "only in the file"], ["WARNING", "and this"],
    ]  # fmt: skip
    assert "only in the file" not in "".join(capsys.readouterr())
    assert logging.root.handlers == before
    assert len(list(tmp_path.iterdir())) == module.KEEP_LOGS
    assert not (tmp_path / "retrain-11.log").exists()
