"""May this model serve? A pure function of a policy, two score records and what was found about the model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from darkroom.evaluation.protocol import Estimate, ScoreRecord, SetScore
from darkroom.params import GatePolicy

Relation = Literal["first", "better", "tied", "worse"]
Z_95 = 1.96  # half the width of a normal 95 % interval, in standard errors


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
    relation: Relation  # to the champion, by what lies beyond the margins
    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)  # what was looked at, and its limits


def require_same_protocol(mine: ScoreRecord, theirs: ScoreRecord) -> None:
    """Raise ProtocolMismatch, naming the fields that differ, unless the records can be compared."""
    if mine.protocol_digest != theirs.protocol_digest:
        differences = "; ".join(mine.protocol.differences(theirs.protocol))
        raise ProtocolMismatch(f"scores under different protocols are not compared: {differences}")


def decide(policy: GatePolicy, challenger: ScoreRecord, champion: ScoreRecord | None, evidence: Evidence) -> Verdict:
    """Pass a challenger that is sound, meets the ceilings and is not worse than the champion beyond the margin.

    The margin is `policy.margin` standard errors of the difference between two models as good as the champion. They
    come from the champion's record alone, so that no challenger widens it by scattering. A figure that is not a number
    never passes. Models of images without classes have no class accuracy: nothing is asked of it, and it is not among
    the figures. Raises ProtocolMismatch if the champion was scored under another protocol: score it again
    (`evaluation.rescore.score_model`) instead.
    """
    if champion is not None:
        require_same_protocol(challenger, champion)
    checks = _Checks()
    if not challenger.finite:
        checks.reasons.append("the weights are not all finite")
    if not evidence.validated:
        checks.reasons.append("nothing says that the data it was trained on was validated")
    _ceilings(checks, policy, challenger, evidence)
    relation: Relation = "first" if champion is None else _relation(checks, policy, challenger, champion)
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


def _relation(checks: _Checks, policy: GatePolicy, challenger: ScoreRecord, champion: ScoreRecord) -> Relation:
    """Check FID and class accuracies against the champion's; FID tells better from tied if nothing is worse."""
    mine, theirs = challenger.unguided, champion.unguided
    margin = policy.margin * math.sqrt(2) * fid_error(theirs)
    held = [checks.at_most("unguided.fid", mine.fid.value, theirs.fid.value + margin, "champion's FID + margin")]
    for name, own, other in (
        ("unguided", mine.class_accuracy, theirs.class_accuracy),
        ("guided", challenger.guided.class_accuracy, champion.guided.class_accuracy),
    ):
        if own is not None and other is not None:  # under one protocol, and so one classifier, there are all or none
            error = share_error(other, champion.protocol.num_images)
            limit = other.value - policy.margin * math.sqrt(2) * error
            held.append(
                checks.at_least(f"{name}.class_accuracy", own.value, limit, f"champion's {name} accuracy - margin")
            )
    if not all(held):
        return "worse"
    return "better" if mine.fid.value < theirs.fid.value - margin else "tied"


def fid_error(score: SetScore) -> float:
    """Standard error of the FID's mean over seeds, in FID.

    The larger of two estimates: the spread over seeds, which few seeds can make too small by luck, and the interval
    over resampled images of one seed.
    """
    low, high = score.fid_bootstrap
    return max(score.fid.spread or 0.0, (high - low) / (2 * Z_95)) / math.sqrt(len(score.fid.seeds))


def share_error(share: Estimate, num_images: int) -> float:
    """Standard error of a share of `num_images` for each seed: from the spread, at least that of independent images.

    One success and one failure are added, so that a share of 0 or 1 is not taken for certain (Agresti & Coull 1998).
    """
    count = num_images * len(share.seeds)
    smoothed = (share.value * count + 1) / (count + 2)
    binomial = math.sqrt(smoothed * (1 - smoothed) / count)
    return max((share.spread or 0.0) / math.sqrt(len(share.seeds)), binomial)
