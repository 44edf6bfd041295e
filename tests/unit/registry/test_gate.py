"""The gate: what passes, what does not, and that it says why."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import GatePolicy
from darkroom.registry.gate import ProtocolMismatch, decide
from tests.integration.registry_project import score_record

POLICY = GatePolicy(
    max_fid=0.8,
    min_class_accuracy=0.95,
    min_guided_class_accuracy=0.99,
    max_fid_increase=0.1,
    max_class_accuracy_decrease=0.01,
)
GOOD = score_record(fid=0.5, accuracy=0.97, guided_accuracy=0.995)
fids = st.floats(0, 5) | st.sampled_from([math.nan, math.inf])
accuracies = st.floats(0, 1) | st.just(math.nan)
records = st.builds(lambda f, a, g: score_record(fid=f, accuracy=a, guided_accuracy=g), fids, accuracies, accuracies)


def test_the_first_good_model_passes() -> None:
    verdict = decide(POLICY, GOOD, None)
    assert verdict.passed
    assert verdict.reasons == []
    assert verdict.figures["unguided.fid"] == 0.5
    assert verdict.figures["max_fid"] == 0.8


@pytest.mark.parametrize(
    ("challenger", "reason"),
    [
        (score_record(fid=0.81), "unguided.fid is 0.81: expected at most 0.8 (max_fid)"),
        (
            score_record(accuracy=0.94),
            "unguided.class_accuracy is 0.94: expected at least 0.95 (min_class_accuracy)",
        ),
        (
            score_record(guided_accuracy=0.98),
            "guided.class_accuracy is 0.98: expected at least 0.99 (min_guided_class_accuracy)",
        ),
        (GOOD.model_copy(update={"finite": False}), "the weights are not all finite"),
    ],
)
def test_a_ceiling_that_is_missed_is_named_with_both_figures(challenger: ScoreRecord, reason: str) -> None:
    verdict = decide(POLICY, challenger, None)
    assert not verdict.passed
    assert verdict.reasons == [reason]


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert len(decide(POLICY, score_record(fid=9, accuracy=0.1, guided_accuracy=0.1), GOOD).reasons) == 6


def test_worse_than_the_champion_within_the_margin_passes_and_beyond_it_does_not() -> None:
    assert decide(POLICY, score_record(fid=0.6, accuracy=0.97), GOOD).passed
    verdict = decide(POLICY, score_record(fid=0.61, accuracy=0.97), GOOD)
    assert verdict.reasons == ["unguided.fid is 0.61: expected at most 0.6 (champion's + max_fid_increase)"]
    assert decide(POLICY, score_record(accuracy=0.961), GOOD).passed
    assert not decide(POLICY, score_record(accuracy=0.959), GOOD).passed


@pytest.mark.parametrize("field", ["sampler", "steps", "guidance_scale", "num_images", "extractor", "seed"])
def test_scores_under_different_protocols_are_never_compared(field: str) -> None:
    changed: dict[str, object] = {"sampler": "ddim", "extractor": "x" * 64}
    other = score_record(**{field: changed.get(field, 7)})
    with pytest.raises(ProtocolMismatch, match=field):
        decide(POLICY, other, GOOD)


def test_without_classes_nothing_is_asked_of_class_accuracy_nor_is_it_among_the_figures() -> None:
    def unlabelled(fid: float) -> ScoreRecord:
        return score_record(fid=fid, accuracy=None, guided_accuracy=None, guidance_scale=1.0)

    verdict = decide(POLICY, unlabelled(0.6), unlabelled(0.55))
    assert verdict.passed
    assert verdict.figures == {
        "unguided.fid": 0.6,
        "max_fid": 0.8,
        "champion's + max_fid_increase": pytest.approx(0.65),
    }
    assert decide(POLICY, unlabelled(0.9), None).reasons == ["unguided.fid is 0.9: expected at most 0.8 (max_fid)"]
    assert not decide(POLICY, unlabelled(0.7), unlabelled(0.5)).passed


@given(records, records)
def test_beyond_a_margin_or_a_ceiling_never_passes(challenger: ScoreRecord, champion: ScoreRecord) -> None:
    verdict = decide(POLICY, challenger, champion)
    mine, theirs = challenger.unguided, champion.unguided
    good = (
        mine.fid <= POLICY.max_fid
        and mine.fid <= theirs.fid + POLICY.max_fid_increase
        and mine.class_accuracy >= POLICY.min_class_accuracy
        and mine.class_accuracy >= theirs.class_accuracy - POLICY.max_class_accuracy_decrease
        and challenger.guided.class_accuracy >= POLICY.min_guided_class_accuracy
        and challenger.guided.class_accuracy >= champion.guided.class_accuracy - POLICY.max_class_accuracy_decrease
    )
    assert verdict.passed == good
    assert verdict.passed == (not verdict.reasons)


@given(records, records, st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_model_that_is_better_in_everything_passes_wherever_the_other_does(
    challenger: ScoreRecord, champion: ScoreRecord, fid: float, accuracy: float, guided: float
) -> None:
    better = score_record(
        fid=max(0.0, challenger.unguided.fid - fid),
        accuracy=min(1.0, challenger.unguided.class_accuracy + accuracy),
        guided_accuracy=min(1.0, challenger.guided.class_accuracy + guided),
    )
    if decide(POLICY, challenger, champion).passed:
        assert decide(POLICY, better, champion).passed


@given(records)
def test_what_is_not_a_number_never_passes(champion: ScoreRecord) -> None:
    for broken in ({"fid": math.nan}, {"accuracy": math.nan}, {"guided_accuracy": math.nan}, {"fid": -math.inf}):
        assert not decide(POLICY, score_record(**broken), champion).passed
        assert not decide(POLICY, score_record(**broken), None).passed
    assert not decide(POLICY, GOOD, score_record(fid=math.nan)).passed, "nothing can be said beside such a champion"
