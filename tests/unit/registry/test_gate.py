"""The gate: what passes, what does not, and that it says why."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.evaluation.protocol import Estimate, ScoreRecord
from darkroom.params import GatePolicy
from darkroom.registry.gate import Evidence, ProtocolMismatch, decide, fid_error, share_error
from tests.integration.registry_project import estimate, score_record

POLICY = GatePolicy(
    max_fid=0.8,
    min_class_accuracy=0.95,
    min_guided_class_accuracy=0.99,
    min_worst_class_accuracy=0.9,
    max_near_copies=0.05,
    margin=2.0,
    retraining_scatter=0.0,
    max_seconds_per_image=1.0,
)
NO_CEILINGS = {"max_fid": 1e6, "max_near_copies": 1.0, "max_seconds_per_image": 1e6}
NO_CEILINGS |= dict.fromkeys(("min_class_accuracy", "min_guided_class_accuracy", "min_worst_class_accuracy"), 0.0)
OPEN = POLICY.model_copy(update=NO_CEILINGS)
SOUND = Evidence(validated=True, seconds_per_image=0.1)
GOOD = score_record(fid=0.5, accuracy=0.97, guided_accuracy=0.995)
MARGIN = 2.0 * math.sqrt(2) * 0.05 / math.sqrt(2)  # of GOOD: margin, a difference, its spread, two seeds

fids = st.floats(0, 5) | st.sampled_from([math.nan, math.inf])
shares = st.floats(0, 1) | st.just(math.nan)
spreads = st.floats(0, 1)


def record(fid: float, accuracy: float, guided: float, spread: float) -> ScoreRecord:
    return score_record(fid=fid, accuracy=accuracy, guided_accuracy=guided, spread=spread)


records = st.builds(record, fids, shares, shares, spreads)
sane = st.builds(record, st.floats(0, 5), st.floats(0, 1), st.floats(0, 1), spreads)


def test_the_first_good_model_passes_on_ceilings_alone() -> None:
    verdict = decide(POLICY, GOOD, None, SOUND)
    assert (verdict.passed, verdict.relation, verdict.reasons) == (True, "first", [])
    assert verdict.figures["unguided.fid"] == 0.5
    assert verdict.figures["max_fid"] == 0.8
    assert not any("champion" in name for name in verdict.figures)


@pytest.mark.parametrize(
    ("challenger", "evidence", "reason"),
    [
        (score_record(fid=0.81), SOUND, "unguided.fid is 0.81: expected at most 0.8 (max_fid)"),
        (
            score_record(accuracy=0.94),
            SOUND,
            "unguided.class_accuracy is 0.94: expected at least 0.95 (min_class_accuracy)",
        ),
        (
            score_record(guided_accuracy=0.98),
            SOUND,
            "guided.class_accuracy is 0.98: expected at least 0.99 (min_guided_class_accuracy)",
        ),
        (GOOD.model_copy(update={"finite": False}), SOUND, "the weights are not all finite"),
        (GOOD, Evidence(False, 0.1), "nothing says that the data it was trained on was validated"),
        (GOOD, Evidence(True, 1.5), "seconds_per_image is 1.5: expected at most 1 (max_seconds_per_image)"),
        (GOOD, Evidence(True, math.nan), "seconds_per_image is nan: expected at most 1 (max_seconds_per_image)"),
    ],
)
def test_a_ceiling_that_is_missed_is_named_with_both_figures(
    challenger: ScoreRecord, evidence: Evidence, reason: str
) -> None:
    verdict = decide(POLICY, challenger, None, evidence)
    assert not verdict.passed
    assert verdict.reasons == [reason]


@pytest.mark.parametrize("worst", [0.5, math.nan])
def test_one_class_that_is_drawn_badly_is_enough(worst: float) -> None:
    accuracies = [0.999] * 9 + [worst]
    guided = GOOD.guided.model_copy(update={"class_accuracies": accuracies})
    verdict = decide(POLICY, GOOD.model_copy(update={"guided": guided}), None, SOUND)
    assert verdict.reasons == [
        f"guided.worst_class_accuracy is {worst:.4g}: expected at least 0.9 (min_worst_class_accuracy)"
    ]


def test_a_model_that_copies_its_training_images_is_refused_however_good_its_fid() -> None:
    verdict = decide(POLICY, score_record(fid=0.01, near_copies=0.3), None, SOUND)
    assert verdict.reasons == [
        "unguided.near_copies is 0.3: expected at most 0.05 (max_near_copies)",
        "guided.near_copies is 0.3: expected at most 0.05 (max_near_copies)",
    ]


def test_all_that_is_wrong_is_said_at_once() -> None:
    bad = score_record(fid=9, accuracy=0.1, guided_accuracy=0.1, near_copies=0.5).model_copy(update={"finite": False})
    assert len(decide(POLICY, bad, GOOD, Evidence(False, 9.0)).reasons) == 12


def test_the_margin_is_the_champions_standard_errors_of_a_difference() -> None:
    assert abs(MARGIN - 0.1) < 1e-12
    assert decide(POLICY, score_record(fid=0.5 + 0.99 * MARGIN), GOOD, SOUND).relation == "tied"
    worse = decide(POLICY, score_record(fid=0.5 + 1.01 * MARGIN), GOOD, SOUND)
    assert (worse.passed, worse.relation) == (False, "worse")
    assert worse.reasons == ["unguided.fid is 0.601: expected at most 0.6 (champion's FID + margin)"]
    assert decide(POLICY, score_record(fid=0.5 - 0.99 * MARGIN), GOOD, SOUND).relation == "tied"
    assert decide(POLICY, score_record(fid=0.5 - 1.01 * MARGIN), GOOD, SOUND).relation == "better"


def test_a_challenger_that_scatters_does_not_get_a_wider_margin() -> None:
    assert not decide(POLICY, score_record(fid=0.61, spread=10.0), GOOD, SOUND).passed


def test_a_spread_that_is_small_by_luck_is_not_believed() -> None:
    lucky = GOOD.unguided.model_copy(update={"fid": estimate(0.5, 1e-9)})  # its images still say 0.05
    champion = GOOD.model_copy(update={"unguided": lucky})
    assert decide(POLICY, score_record(fid=0.53), champion, SOUND).relation == "tied"


def test_one_seed_has_a_margin_too() -> None:
    alone = Estimate(value=0.5, spread=None, low=None, high=None, seeds=[0.5])
    unguided = GOOD.unguided.model_copy(update={"fid": alone, "fid_deviation": 0.05})
    assert fid_error(unguided, 0.0) == pytest.approx(0.05)
    assert fid_error(unguided, 0.1) == pytest.approx(math.hypot(0.05, 0.1 * 0.5)), "trainings scatter by 10 % of FID"


def test_the_best_champion_so_far_is_a_bar_as_well() -> None:
    best, champion = score_record(fid=0.45), score_record(fid=0.54)
    assert decide(POLICY, score_record(fid=0.6), champion, SOUND).passed
    verdict = decide(POLICY, score_record(fid=0.6), champion, SOUND, best)
    assert verdict.reasons == ["unguided.fid is 0.6: expected at most 0.55 (best champion's FID + margin)"]
    assert (verdict.passed, verdict.relation) == (False, "worse")
    assert decide(POLICY, score_record(fid=0.549), champion, SOUND, best).relation == "tied"
    assert decide(POLICY, score_record(fid=0.43), champion, SOUND, best).relation == "better"
    with pytest.raises(ProtocolMismatch, match="steps"):
        decide(POLICY, GOOD, champion, SOUND, score_record(steps=7))


def test_a_share_of_one_is_not_certain() -> None:
    certain = Estimate(value=1.0, spread=0.0, low=1.0, high=1.0, seeds=[1.0, 1.0])
    assert 0 < share_error(certain, 1000) < 0.002
    champion = score_record(guided_accuracy=1.0)
    assert decide(POLICY, score_record(guided_accuracy=0.995), champion, SOUND).passed


@pytest.mark.parametrize(
    "field", ["sampler", "steps", "guidance_scale", "num_images", "extractor_weights", "seeds", "data", "resize"]
)
def test_scores_under_different_protocols_are_never_compared(field: str) -> None:
    changed: dict[str, object] = {"sampler": "ddim", "seeds": [7, 8], "resize": "bilinear"}
    changed |= dict.fromkeys(("extractor_weights", "data"), "x" * 64)
    other = score_record(**{field: changed.get(field, 7)})
    with pytest.raises(ProtocolMismatch, match=field):
        decide(POLICY, other, GOOD, SOUND)


def test_without_classes_nothing_is_asked_of_class_accuracy_nor_is_it_among_the_figures() -> None:
    def unlabelled(fid: float) -> ScoreRecord:
        return score_record(fid=fid, accuracy=None, guided_accuracy=None, guidance_scale=1.0)

    verdict = decide(POLICY, unlabelled(0.6), unlabelled(0.55), SOUND)
    assert verdict.passed
    assert not any("accuracy" in name for name in verdict.figures)
    assert not decide(POLICY, unlabelled(0.9), None, SOUND).passed
    assert not decide(POLICY, unlabelled(0.7), unlabelled(0.5), SOUND).passed


@given(sane, sane)
def test_a_challenger_that_is_worse_beyond_the_margin_never_passes(
    challenger: ScoreRecord, champion: ScoreRecord
) -> None:
    margin = OPEN.margin * math.sqrt(2) * fid_error(champion.unguided, 0.0)
    verdict = decide(OPEN, challenger, champion, SOUND)
    if challenger.unguided.fid.value > champion.unguided.fid.value + margin:
        assert not verdict.passed
    assert verdict.passed == (not verdict.reasons) == (verdict.relation != "worse")


@given(sane, st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_noise_within_the_margin_flips_nothing(champion: ScoreRecord, fid: float, plain: float, guided: float) -> None:
    """The champion's own scores again, each off by less than its margin: neither better nor refused."""
    widths = [fid_error(champion.unguided, 0.0)]
    for score in (champion.unguided, champion.guided):
        assert score.class_accuracy is not None
        widths.append(share_error(score.class_accuracy, champion.protocol.num_images))
    by = [
        0.99 * OPEN.margin * math.sqrt(2) * width * part
        for width, part in zip(widths, (fid, plain, guided), strict=True)
    ]
    unguided, with_guidance = champion.unguided, champion.guided

    def moved(old: Estimate | None, shift: float) -> Estimate:
        assert old is not None
        return old.model_copy(update={"value": old.value + shift})

    challenger = champion.model_copy(
        update={
            "unguided": unguided.model_copy(
                update={
                    "fid": moved(unguided.fid, by[0]),
                    "class_accuracy": moved(unguided.class_accuracy, by[1]),
                }
            ),
            "guided": with_guidance.model_copy(update={"class_accuracy": moved(with_guidance.class_accuracy, by[2])}),
        }
    )
    if min(abs(shift) for shift in by) > 1e-12 or not any(by):  # else rounding decides
        assert decide(OPEN, challenger, champion, SOUND).relation == "tied"


@given(sane, sane)
def test_no_two_models_are_better_than_each_other(one: ScoreRecord, other: ScoreRecord) -> None:
    relations = {decide(OPEN, one, other, SOUND).relation, decide(OPEN, other, one, SOUND).relation}
    assert relations != {"better"}


@given(records, records, st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_model_that_is_better_in_everything_passes_wherever_the_other_does(
    challenger: ScoreRecord, champion: ScoreRecord, fid: float, plain: float, guided: float
) -> None:
    accuracies = challenger.unguided.class_accuracy, challenger.guided.class_accuracy
    assert accuracies[0] is not None
    assert accuracies[1] is not None
    better = record(
        max(0.0, challenger.unguided.fid.value - fid),
        min(1.0, accuracies[0].value + plain),
        min(1.0, accuracies[1].value + guided),
        0.05,
    )
    if decide(POLICY, challenger, champion, SOUND).passed:
        assert decide(POLICY, better, champion, SOUND).passed


@given(records, st.randoms())
def test_the_order_of_seeds_and_fields_does_not_matter(champion: ScoreRecord, shuffle: random.Random) -> None:
    """Nor that of the arguments' making: the verdict is a function of values."""
    fid = champion.unguided.fid
    seeds = list(fid.seeds)
    shuffle.shuffle(seeds)
    unguided = champion.unguided.model_copy(update={"fid": fid.model_copy(update={"seeds": seeds})})
    again = champion.model_copy(update={"unguided": unguided})
    same = decide(POLICY, GOOD, champion, SOUND), decide(POLICY, GOOD, again, SOUND)
    assert (same[0].passed, same[0].relation, same[0].reasons) == (same[1].passed, same[1].relation, same[1].reasons)


@given(records)
@settings(max_examples=50)
def test_what_is_not_a_number_never_passes(champion: ScoreRecord) -> None:
    for broken in ({"fid": math.nan}, {"accuracy": math.nan}, {"guided_accuracy": math.nan}, {"near_copies": math.nan}):
        assert not decide(POLICY, score_record(**broken), champion, SOUND).passed
        assert not decide(POLICY, score_record(**broken), None, SOUND).passed
    assert not decide(POLICY, GOOD, score_record(fid=math.nan), SOUND).passed, (
        "nothing can be said beside such a champion"
    )
