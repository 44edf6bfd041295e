"""May this model serve? A pure function of a policy, two score records and what was found about the model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from darkroom.evaluation.protocol import Estimate, ScoreRecord, SetScore
from darkroom.params import GatePolicy

Relation = Literal["first", "better", "tied", "worse"]


class ProtocolMismatch(Exception):
    """Two scores that were measured differently were to be compared. The message names what differs."""


@dataclass(frozen=True)
class Evidence:
    """What is known about a version beside its scores."""

    validated: bool  # the data it was trained on passed validation
    seconds_per_image: float  # one image alone, drawn by the registered model in a process of its own


@dataclass(frozen=True)
class Verdict:
    """`reasons` has one line, with figures, for each thing that stands against the challenger."""

    passed: bool
    relation: Relation  # to the champion and the best one so far, by what lies beyond the margins
    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)  # what was looked at, and its limits


def require_same_protocol(mine: ScoreRecord, theirs: ScoreRecord) -> None:
    """Raise ProtocolMismatch, naming the fields that differ, unless the records can be compared."""
    if mine.protocol_digest != theirs.protocol_digest:
        differences = "; ".join(mine.protocol.differences(theirs.protocol))
        raise ProtocolMismatch(f"scores under different protocols are not compared: {differences}")


def decide(
    policy: GatePolicy,
    challenger: ScoreRecord,
    champion: ScoreRecord | None,
    evidence: Evidence,
    best: ScoreRecord | None = None,
) -> Verdict:
    """Pass a challenger that is sound, meets the ceilings and is not worse than the champion beyond the margin.

    Nor may it be worse than `best`, the best champion so far: otherwise many models, each a little worse than the one
    before and within the margin, would together be much worse. The margin is `policy.margin` standard errors of the
    difference between two models as good as the one that it is compared with. They come from that one's record alone,
    so that no challenger widens it by scattering. A figure that is not a number never passes. Models of images without
    classes have no class accuracy: nothing is asked of it, and it is not among the figures. Raises ProtocolMismatch if
    another record has another protocol: score it again (`evaluation.rescore.score_model`) instead.
    """
    others = {"champion": champion, "best champion": best}
    for other in others.values():
        if other is not None:
            require_same_protocol(challenger, other)
    checks = _Checks()
    if not challenger.finite:
        checks.reasons.append("the weights are not all finite")
    if not evidence.validated:
        checks.reasons.append("nothing says that the data it was trained on was validated")
    _ceilings(checks, policy, challenger, evidence)
    holds = [_not_worse(checks, policy, challenger, other, name) for name, other in others.items() if other is not None]
    relation: Relation = "tied"
    if champion is None:
        relation = "first"
    elif not all(holds):
        relation = "worse"
    elif challenger.unguided.fid.value < champion.unguided.fid.value - fid_margin(policy, champion):
        relation = "better"
    return Verdict(not checks.reasons, relation, checks.reasons, checks.figures)


@dataclass
class _Checks:
    """What was looked at so far. NaN compares false with everything, so it fails every check."""

    reasons: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def at_most(self, name: str, value: float, limit: float, limit_name: str) -> bool:
        return self._check(name, value, limit, limit_name, value <= limit, "at most")

    def at_least(self, name: str, value: float, limit: float, limit_name: str) -> bool:
        return self._check(name, value, limit, limit_name, value >= limit, "at least")

    def _check(self, name: str, value: float, limit: float, limit_name: str, holds: bool, words: str) -> bool:
        self.figures[name], self.figures[limit_name] = value, limit
        good = holds and math.isfinite(value)
        if not good:
            self.reasons.append(f"{name} is {value:.4g}: expected {words} {limit:.4g} ({limit_name})")
        return good


def _ceilings(checks: _Checks, policy: GatePolicy, challenger: ScoreRecord, evidence: Evidence) -> None:
    unguided, guided = challenger.unguided, challenger.guided
    checks.at_most("unguided.fid", unguided.fid.value, policy.max_fid, "max_fid")
    if unguided.class_accuracy and guided.class_accuracy and guided.class_accuracies:
        checks.at_least(
            "unguided.class_accuracy", unguided.class_accuracy.value, policy.min_class_accuracy, "min_class_accuracy"
        )
        checks.at_least(
            "guided.class_accuracy",
            guided.class_accuracy.value,
            policy.min_guided_class_accuracy,
            "min_guided_class_accuracy",
        )
        checks.at_least(
            "guided.worst_class_accuracy",
            worst(guided.class_accuracies),
            policy.min_worst_class_accuracy,
            "min_worst_class_accuracy",
        )
    for name, score in (("unguided", unguided), ("guided", guided)):
        checks.at_most(f"{name}.near_copies", score.memorisation.near_copies, policy.max_near_copies, "max_near_copies")
    checks.at_most(
        "seconds_per_image", evidence.seconds_per_image, policy.max_seconds_per_image, "max_seconds_per_image"
    )


def worst(values: list[float]) -> float:
    """The smallest value, NaN if there is one among them."""
    return min(values, key=lambda value: (not math.isnan(value), value))


def _not_worse(checks: _Checks, policy: GatePolicy, challenger: ScoreRecord, other: ScoreRecord, name: str) -> bool:
    """Check FID and class accuracies against another model's."""
    mine, theirs = challenger.unguided, other.unguided
    limit = theirs.fid.value + fid_margin(policy, other)
    held = [checks.at_most("unguided.fid", mine.fid.value, limit, f"{name}'s FID + margin")]
    for kind, own, known in (
        ("unguided", mine.class_accuracy, theirs.class_accuracy),
        ("guided", challenger.guided.class_accuracy, other.guided.class_accuracy),
    ):
        if own is not None and known is not None:  # under one protocol, and so one classifier, there are all or none
            error = share_error(known, other.protocol.num_images)
            limit = known.value - policy.margin * math.sqrt(2) * error
            held.append(
                checks.at_least(f"{kind}.class_accuracy", own.value, limit, f"{name}'s {kind} accuracy - margin")
            )
    return all(held)


def fid_margin(policy: GatePolicy, record: ScoreRecord) -> float:
    """By how much the FIDs of two models as good as this one may differ by chance."""
    return policy.margin * math.sqrt(2) * fid_error(record.unguided, policy.retraining_scatter)


def fid_error(score: SetScore, retraining_scatter: float) -> float:
    """Standard error of the FID's mean over seeds, in FID: of the images drawn, and of where a training ends.

    The first comes from the images of all seeds, not from the spread over them: few values tell little of a deviation.
    """
    return math.hypot(score.fid_deviation / math.sqrt(len(score.fid.seeds)), retraining_scatter * score.fid.value)


def share_error(share: Estimate, num_images: int) -> float:
    """Standard error of a share of `num_images` for each seed: from the spread, at least that of independent images.

    One success and one failure are added, so that a share of 0 or 1 is not taken for certain (Agresti & Coull 1998).
    """
    count = num_images * len(share.seeds)
    smoothed = (share.value * count + 1) / (count + 2)
    binomial = math.sqrt(smoothed * (1 - smoothed) / count)
    return max((share.spread or 0.0) / math.sqrt(len(share.seeds)), binomial)
