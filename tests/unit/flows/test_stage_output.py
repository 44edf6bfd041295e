"""What DVC and a stage print, read as an outcome or as an error."""

import logging
import traceback
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.progress import progress
from flows.stage_output import LOG_EVERY, Progress, StageLog, classify, dvc_message, failure

INFO, WARNING, ERROR = logging.INFO, logging.WARNING, logging.ERROR


class Log:
    """A StageLog with a clock of its own, and what came out of it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.entries: list[tuple[int, str]] = []
        self.progress: list[Progress] = []
        emit = lambda level, text: self.entries.append((level, text))  # noqa: E731
        self.log = StageLog(emit, self.progress.append, clock=lambda: self.now)

    def read(self, *lines: str, seconds: float = 0.0) -> list[tuple[int, str]]:
        """The entries for these lines, which come `seconds` after each other."""
        for line in lines:
            self.log.line(line)
            self.now += seconds
        self.log.close()
        return self.entries


def ended(code: int) -> str:
    return f"ERROR: failed to reproduce 'train': failed to run: python -m darkroom.stages.train, exited with {code}"


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("Running stage 'train':", "Ran"),
        ("Stage 'train' is cached - skipping run, checking out outputs", "Restored"),
        ("Stage 'train' didn't change, skipping", "Cached"),
    ],
)
def test_dvc_s_first_word_counts_not_what_the_stage_prints_later(line: str, outcome: str) -> None:
    lies = ["Stage 'train' didn't change, skipping", "Running stage 'train':"]
    assert classify("train", ["WARNING: something else", line, *lies]) == outcome


def test_lines_about_another_stage_do_not_count() -> None:
    with pytest.raises(StageFailed, match="without saying what it did"):
        classify("train", ["Running stage 'sample':"])


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1, StageFailed),
        (2, InputError),
        (75, Interrupted),
        (130, Interrupted),  # the runner's, or a shell's for SIGINT
        (143, Interrupted),  # a shell's for SIGTERM
        (-15, Interrupted),  # without a shell between
        (137, StageFailed),  # out of memory
        (-9, StageFailed),
    ],
)
def test_the_stage_s_own_exit_code_decides(code: int, kind: type[Exception]) -> None:
    assert type(failure("train", 255, ["Running stage 'train':", "some output", ended(code)])) is kind


def test_every_line_about_bad_parameters_is_kept_and_no_progress() -> None:
    lines = ["train: step 10", "loading", "train: params.yaml: a = 1", "train: params.yaml: b = 2", ended(2)]
    assert str(failure("train", 255, lines)) == "train: params.yaml: a = 1\ntrain: params.yaml: b = 2"


def test_a_failure_of_dvc_itself_is_its_own_message() -> None:
    error = failure("nope", 255, ["ERROR: Stage 'nope' not found inside 'dvc.yaml' file", ""])
    assert str(error) == "stage nope: DVC ended with 255: Stage 'nope' not found inside 'dvc.yaml' file"


def test_dvc_s_error_counts_not_the_advice_that_follows() -> None:
    assert (
        dvc_message(["ERROR: unexpected error - x", "", "Having any troubles? Hit us up at …"])
        == "unexpected error - x"
    )
    assert dvc_message(["cannot be read", ""]) == "cannot be read"
    assert dvc_message([]) == "nothing"


def test_progress_is_read_as_darkroom_prints_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkroom.progress.EVERY_SECONDS", 0.0)
    now = 100.0
    monkeypatch.setattr("darkroom.progress.time.monotonic", lambda: now)
    with progress("reference classifier", 300, "steps") as advance:
        now = 101.0
        advance(10)
        now = 102.0
        advance(20, "loss 0.12  5.0 images/s")
        advance(300)
    assert [Progress.read(line) for line in capsys.readouterr().out.splitlines()] == [
        None,  # that it starts
        Progress("reference classifier", 10, 300, "steps", "29 s", "10 steps/s"),
        Progress("reference classifier", 20, 300, "steps", "28 s", "loss 0.12  5.0 images/s"),
        Progress("reference classifier", 300, 300, "steps", "", "290 steps/s"),
    ]


@pytest.mark.parametrize(
    "line", ["trained 40 steps; EMA weights 0f", "at 10:20/30", "a: 3/4", "> python -m x", "a: 1/2 b c"]
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert Progress.read(line) is None


@pytest.mark.parametrize(("done", "total", "percent"), [(0, 10, 0.0), (5, 10, 50.0), (11, 10, 100.0), (0, 0, 100.0)])
def test_percent_stays_in_its_range(done: int, total: int, percent: float) -> None:
    assert Progress("training", done, total, "steps").percent == percent


def test_of_an_hour_of_progress_the_first_line_the_last_and_one_every_few_seconds_are_logged() -> None:
    log = Log()
    lines = [f"training: {step}/10000 steps, 1 min left  loss 0.1" for step in range(1, 3601)]
    texts = [text for _, text in log.read(*lines, seconds=1.0)]
    assert texts[0] == lines[0]
    assert texts[-1] == lines[-1]
    assert len(texts) <= 3600 / LOG_EVERY + 2
    assert len(log.progress) == 3600


def test_the_end_of_a_work_is_logged_and_the_next_work_starts_anew() -> None:
    lines = ["a: 1/3 x", "a: 2/3 x", "a: 3/3 x", "b: 1/9 x", "b: 2/9 x", "c: 1/2 x", "done"]
    assert [text for _, text in Log().read(*lines)] == [
        "a: 1/3 x", "a: 3/3 x", "b: 1/9 x", "b: 2/9 x", "c: 1/2 x", "done",
    ]  # fmt: skip


def test_another_line_comes_after_the_progress_that_it_followed() -> None:
    lines = ["a: 1/9 x", "a: 2/9 x", "a: 3/9 x", "resuming", "a: 4/9 x"]
    assert [text for _, text in Log().read(*lines)] == ["a: 1/9 x", "a: 3/9 x", "resuming", "a: 4/9 x"]


def test_a_progress_bar_is_collapsed_as_well() -> None:
    lines = [f"Transferring: {percent:3d}%|{'█' * (percent // 10)}" for percent in range(101)]
    assert [text for _, text in Log().read(*lines)] == [lines[0], lines[-1]]


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("ERROR: failed to reproduce 'train'", ERROR),
        ("CRITICAL:root:no", ERROR),
        ("WARNING: stage 'train' is frozen", WARNING),
        ("/a/b.py:12: UserWarning: deprecated", WARNING),
        ("Running stage 'train':", INFO),
        ("WARNING: Process 'dvc repro' with (Pid 7), in RWLock-file 'a' had been killed. Auto removed it from …", INFO),
        ("ERRORS are counted here", INFO),
        ("train: params.yaml: x = 1", INFO),
    ],
)
def test_a_line_has_the_level_that_its_beginning_says(line: str, level: int) -> None:
    assert Log().read(line) == [(level, line)]


def test_a_python_warning_keeps_its_source_line() -> None:
    text = warnings.formatwarning("slow", UserWarning, "a.py", 3, line="compute()")
    assert Log().read(*text.splitlines(), "next") == [
        (WARNING, "a.py:3: UserWarning: slow"), (WARNING, "  compute()"), (INFO, "next"),
    ]  # fmt: skip


def test_a_traceback_is_one_entry_and_an_error() -> None:
    try:
        try:
            raise KeyError("a")
        except KeyError as error:
            raise ValueError("b") from error
    except ValueError:
        lines = [line for line in traceback.format_exc().splitlines() if line]
    levels, texts = zip(*Log().read("before", *lines, "after"), strict=True)
    assert levels == (INFO, ERROR, ERROR, ERROR, INFO)
    assert texts[1].startswith("Traceback (most recent call last):\n  File ")
    assert texts[1].endswith("KeyError: 'a'")
    assert texts[3].endswith("ValueError: b")


def test_a_traceback_that_breaks_off_is_not_lost() -> None:
    cut = ["Traceback (most recent call last):", '  File "a.py", line 1']
    assert Log().read(*cut) == [(ERROR, "\n".join(cut))]


def test_dvc_s_advice_is_left_out() -> None:
    lines = [
        "Updating lock file 'dvc.lock'",
        "To track the changes with git, run:",
        "\tgit add dvc.lock reports/.gitignore",
        "To enable auto staging, run:",
        "\tdvc config core.autostage true",
        "Use `dvc push` to send your updates to remote storage.",
    ]
    assert Log().read(*lines) == [(INFO, lines[0])]


@given(st.lists(st.sampled_from(
    ["Traceback (most recent call last):", "  indented", "E: x", "WARNING: y", "plain", "a.py:3: UserWarning: z"]
)))  # fmt: skip
def test_nothing_but_progress_is_dropped_or_reordered(lines: list[str]) -> None:
    assert "\n".join(text for _, text in Log().read(*lines)) == "\n".join(lines)
