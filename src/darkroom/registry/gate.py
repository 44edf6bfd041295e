"""May this model serve? A pure function of a policy and two score records."""

import math
from dataclasses import dataclass, field

from darkroom.evaluation.protocol import ScoreRecord
from darkroom.params import GatePolicy


class ProtocolMismatch(Exception):
    """Two scores that were measured differently were to be compared. The message names what differs."""


@dataclass(frozen=True)
class Verdict:
    """`reasons` has one line, with figures, for each thing that stands against the challenger."""

    passed: bool
    reasons: list[str]
    figures: dict[str, float] = field(default_factory=dict)  # what was looked at, and its limits


def decide(policy: GatePolicy, challenger: ScoreRecord, champion: ScoreRecord | None) -> Verdict:
    """Pass a challenger that is finite, meets the ceilings and is not worse than the champion beyond the margins.

    A figure that is not a number never passes. Models of images without classes have no class accuracy: nothing is
    asked of it, and it is not among the figures. Raises ProtocolMismatch if the champion was scored under another
    protocol: score it again (`evaluation.rescore.score_model`) instead.
    """
    if champion is not None and champion.protocol_digest != challenger.protocol_digest:
        differences = "; ".join(challenger.protocol.differences(champion.protocol))
        raise ProtocolMismatch(f"challenger and champion were scored under different protocols: {differences}")

    reasons = [] if challenger.finite else ["the weights are not all finite"]
    figures = {}

    def at_most(name: str, value: float, limit: float, limit_name: str) -> None:
        figures[name], figures[limit_name] = value, limit
        if not (math.isfinite(value) and value <= limit):  # NaN compares false with everything
            reasons.append(f"{name} is {value:.4g}: expected at most {limit:.4g} ({limit_name})")

    def at_least(name: str, value: float | None, limit: float | None, limit_name: str) -> None:
        if value is None or limit is None:  # in one protocol, and so with one extractor, there are all or none
            return
        figures[name], figures[limit_name] = value, limit
        if not (math.isfinite(value) and value >= limit):
            reasons.append(f"{name} is {value:.4g}: expected at least {limit:.4g} ({limit_name})")

    unguided, guided = challenger.unguided, challenger.guided
    at_most("unguided.fid", unguided.fid, policy.max_fid, "max_fid")
    at_least("unguided.class_accuracy", unguided.class_accuracy, policy.min_class_accuracy, "min_class_accuracy")
    at_least(
        "guided.class_accuracy", guided.class_accuracy, policy.min_guided_class_accuracy, "min_guided_class_accuracy"
    )
    if champion is not None:
        served = champion.unguided
        fid = served.fid + policy.max_fid_increase
        accuracy, guided_accuracy = (
            None if score.class_accuracy is None else score.class_accuracy - policy.max_class_accuracy_decrease
            for score in (served, champion.guided)
        )
        at_most("unguided.fid", unguided.fid, fid, "champion's + max_fid_increase")
        at_least(
            "unguided.class_accuracy", unguided.class_accuracy, accuracy, "champion's - max_class_accuracy_decrease"
        )
        limit_name = "champion's guided - max_class_accuracy_decrease"
        at_least("guided.class_accuracy", guided.class_accuracy, guided_accuracy, limit_name)
    return Verdict(not reasons, reasons, figures)
