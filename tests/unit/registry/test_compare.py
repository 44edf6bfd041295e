"""Figures side by side: the margin is the gate's, and the gate agrees."""

import pytest

from darkroom.params import GatePolicy
from darkroom.registry.compare import compare_figures
from darkroom.registry.gate import Evidence, decide
from tests.integration.registry_project import score_record

POLICY = GatePolicy(
    max_fid=100,
    min_class_accuracy=0,
    min_guided_class_accuracy=0,
    min_worst_class_accuracy=0,
    max_near_copies=1,
    margin=2.0,
    retraining_scatter=0.0,
    max_seconds_per_image=1,
)


@pytest.mark.parametrize("fid", [0.30, 0.39, 0.41, 0.5, 0.59, 0.61, 0.7])
@pytest.mark.parametrize("spread", [0.01, 0.05])
def test_what_lies_beyond_the_margin_is_what_the_gate_calls_better_or_worse(fid: float, spread: float) -> None:
    mine, theirs = score_record(fid=fid), score_record(fid=0.5, spread=spread)
    (figure,) = [
        each
        for each in compare_figures(mine, theirs, POLICY.margin, POLICY.retraining_scatter)
        if each.name == "unguided.fid"
    ]
    relation = decide(POLICY, mine, theirs, Evidence(True, 0.1)).relation
    assert figure.beyond == (relation != "tied")
    if figure.beyond:
        assert relation == ("worse" if figure.difference > 0 else "better")


def test_one_record_differs_from_itself_in_nothing() -> None:
    record = score_record()
    figures = compare_figures(record, record, 2.0, 0.0)
    assert {figure.difference for figure in figures} == {0}
    assert not any(figure.beyond for figure in figures)
    assert {figure.name for figure in figures if figure.margin is None} == {
        f"{place}.{key}"
        for place in ("unguided", "guided")
        for key in ("fid_infinity", "near_copies", "worst_class_accuracy")
    }


def test_images_without_classes_have_no_class_accuracy() -> None:
    record = score_record(accuracy=None, guided_accuracy=None)
    assert not [figure for figure in compare_figures(record, record, 2.0, 0.0) if "class" in figure.name]
