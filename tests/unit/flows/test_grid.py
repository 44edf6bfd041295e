"""Grids of parameters: complete, named, and refused before anything runs."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.errors import InputError
from flows.grid import check, combinations, experiment_name, parse, title

REPOSITORY = Path(__file__).parents[3]


def test_every_combination_in_order() -> None:
    assert combinations({"a.b": [1, 2], "c": ["x"], "d": [0.5, None]}, 4) == [
        {"a.b": 1, "c": "x", "d": 0.5},
        {"a.b": 1, "c": "x", "d": None},
        {"a.b": 2, "c": "x", "d": 0.5},
        {"a.b": 2, "c": "x", "d": None},
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "an empty grid: expected"),
        ({"train.steps": []}, r"train.steps = \[\]: expected a list of values"),
        ({"train.steps": "100"}, "train.steps = '100': expected a list of values"),
        ({"train.steps": [1, 2, 1]}, "train.steps: 1 is there twice"),
        ({"a": [*range(10)], "b": [*range(10)]}, r"100 combinations: expected at most 50 \(max_runs\)"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid: dict[str, list[object]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        combinations(grid, 50)


def test_a_grid_from_words() -> None:
    words = ["train.steps=100,200", "train.learning_rate=1e-3", "train.model.channels=[16, 32],[8]", "a=x,null,true"]
    assert parse(words) == {
        "train.steps": [100, 200],
        "train.learning_rate": [1e-3],
        "train.model.channels": [[16, 32], [8]],
        "a": ["x", None, True],
    }


@pytest.mark.parametrize("words", [["train.steps"], ["=1"], ["train.steps="], ["a=[1"], ["a=1", "a=2"]])
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"expected key=value|there twice"):
        parse(words)


def test_names_say_what_was_changed() -> None:
    combination = {"train.steps": 500, "sample.guidance_scale": 2.0}
    assert title(combination) == "train.steps=500, sample.guidance_scale=2.0"
    assert experiment_name(combination) == "train.steps=500,sample.guidance_scale=2.0"


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.text()))


@settings(max_examples=30)  # a process of git for each name
@given(st.lists(VALUES, min_size=2, max_size=2, unique_by=repr))
def test_any_value_makes_a_name_of_its_own_that_git_takes(values: list[object]) -> None:
    names = [experiment_name({"train.steps": value}) for value in values]
    assert names[0] != names[1]
    for name in names:
        done = subprocess.run(["git", "check-ref-format", f"refs/exps/01/23/{name}"])
        assert done.returncode == 0, name
        assert "/" not in name


def test_every_mistake_is_found_before_the_first_run() -> None:
    grid = combinations({"train.steps": [100, -1], "train.lable_dropout": [0.1], "sample.steps": [10, 2000]}, 50)
    with pytest.raises(InputError) as caught:
        check(REPOSITORY, grid)
    message = str(caught.value)
    assert 'did you mean "label_dropout"?' in message
    assert "train.steps = -1" in message
    assert message.count("lable_dropout = 0.1: unknown key") == 1


def test_values_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(InputError, match=r"sample.steps = 2000.*\(sample.steps=2000\)"):
        check(REPOSITORY, combinations({"sample.steps": [10, 2000]}, 50))
    check(REPOSITORY, combinations({"sample.steps": [10, 20], "train.steps": [10]}, 50))


def test_a_sweep_over_decays_that_the_warm_up_never_reaches_is_a_sweep_over_nothing() -> None:
    found = check(REPOSITORY, combinations({"train.ema_decay": [0.9, 0.995, 0.999], "train.steps": [1000]}, 50))
    assert [line.partition(":")[0] for line in found] == ["train.ema_decay = 0.995", "train.ema_decay = 0.999"]
    assert "ends at 0.9911 after 1000 steps" in found[0]
    assert found[0].endswith("(train.ema_decay=0.995, train.steps=1000)")
