"""What DVC and a stage print, read as an outcome or as an error."""

import pytest

from darkroom.errors import InputError, Interrupted, StageFailed
from flows.dvc_stage import classify, failure


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
