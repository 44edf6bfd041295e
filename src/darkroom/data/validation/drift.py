"""How far a data set has moved from the one that was last accepted."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from darkroom.data.statistics import DataStatistics, first_error
from darkroom.data.validation.findings import word
from darkroom.errors import InputError
from darkroom.files import read_json, write_json

ACCEPTED_FILE = "accepted.json"  # beside the expectations, in git
NOTHING_ACCEPTED = "no accepted data set; `darkroom data accept` records one"
_NAMED = 5  # new and vanished classes in a sentence
_CHANNELS = {1: ("grey",), 3: ("red", "green", "blue")}


class AcceptedData(DataStatistics):
    """`accepted.json`: the statistics of the accepted data set, and whose decision that was."""

    who: str
    when: str  # UTC, ISO 8601
    reason: str


@dataclass(frozen=True)
class ClassChange:
    name: str
    accepted: float  # share of the images, 0..1
    current: float


@dataclass(frozen=True)
class ChannelChange:
    name: str
    accepted_mean: float  # of the pixels, 0..255
    accepted_std: float
    current_mean: float
    current_std: float
    drift: float  # the larger of both differences, in accepted deviations


@dataclass(frozen=True)
class Drift:
    """What changed between two data sets; a figure is None where they cannot be compared, and `reasons` say why."""

    same: bool  # the same digest: the same images, labels and split
    accepted_name: str
    accepted_digest: str
    class_drift: float | None  # total variation distance of the class shares, 0..1
    channel_drift: float | None  # the largest of `channels`
    reasons: list[str]
    classes: list[ClassChange]  # the largest changes first
    channels: list[ChannelChange]
    new: list[str]  # classes, sorted
    vanished: list[str]

    @property
    def comparable(self) -> bool:
        return not self.reasons

    def class_sentence(self) -> str:
        parts = [self.reasons[-1]] if self.class_drift is None else [f"{self.class_drift:.3g}"]
        for kind, names in (("new", self.new), ("vanished", self.vanished)):
            if names and self.class_drift is not None:
                more = ", …" if len(names) > _NAMED else ""
                parts.append(f"{len(names):,} {kind}: {', '.join(map(word, names[:_NAMED]))}{more}")
        return f"{'; '.join(parts)} ({self._against()})"

    def channel_sentence(self) -> str:
        if self.channel_drift is None:
            return f"{self.reasons[0]} ({self._against()})"
        worst = max(self.channels, key=lambda channel: channel.drift)
        return f"{self.channel_drift:.3g}, {worst.name} ({self._against()})"

    def _against(self) -> str:
        return f"against {self.accepted_name} {self.accepted_digest[:12]}"


def measure(accepted: DataStatistics, current: DataStatistics) -> Drift:
    """Compare `current` with `accepted`. Classes are matched by name.

    Channel means and deviations are compared in units of the accepted deviation, or of one grey level where that is
    smaller. Images of another size or number of channels have no comparable channels, labelled and unlabelled data no
    comparable classes.
    """
    reasons = []
    channels = []
    if (accepted.channels, accepted.image_size) == (current.channels, current.image_size):
        channels = _channel_changes(accepted, current)
    else:
        shapes = [f"{data.channels}x{data.image_size}x{data.image_size}" for data in (accepted, current)]
        reasons.append(f"the accepted images are {shapes[0]}, these are {shapes[1]}")
    before, now = accepted.class_shares(), current.class_shares()
    if bool(before) != bool(now):
        with_labels = "the accepted data set has labels, this one has none"
        reasons.append(with_labels if before else "the accepted data set has no labels, this one has")
    names = sorted(before.keys() | now.keys())
    changes = [ClassChange(name, before.get(name, 0.0), now.get(name, 0.0)) for name in names]
    changes.sort(key=lambda change: -abs(change.current - change.accepted))
    distance = sum(abs(change.current - change.accepted) for change in changes) / 2
    return Drift(
        same=accepted.digest == current.digest,
        accepted_name=accepted.name,
        accepted_digest=accepted.digest,
        class_drift=distance if bool(before) == bool(now) else None,
        channel_drift=max(channel.drift for channel in channels) if channels else None,
        reasons=reasons,
        classes=changes,
        channels=channels,
        new=sorted(now.keys() - before.keys()),
        vanished=sorted(before.keys() - now.keys()),
    )


def _channel_changes(accepted: DataStatistics, current: DataStatistics) -> list[ChannelChange]:
    changes = []
    moments = (accepted.channel_moments(), current.channel_moments())
    for channel, name in enumerate(_CHANNELS.get(current.channels, [str(i) for i in range(current.channels)])):
        (mean, std), (new_mean, new_std) = ((float(m[channel]), float(s[channel])) for m, s in moments)
        drift = max(abs(new_mean - mean), abs(new_std - std)) / max(std, 1.0)
        changes.append(ChannelChange(name, mean, std, new_mean, new_std, drift))
    return changes


def read_accepted(path: Path) -> AcceptedData | None:
    """The accepted data set; None where none was accepted yet. Raises InputError when the file is garbled."""
    try:
        return AcceptedData.model_validate(read_json(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = first_error(error)
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error})"
    raise InputError(f"{path}: {problem}; take it back from git, or delete it and run `darkroom data accept`")


def write_accepted(path: Path, current: DataStatistics, who: str, when: str, reason: str) -> None:
    """Make `current` the accepted data set; the file is whole or what it was before."""
    accepted = AcceptedData(**current.model_dump(), who=who, when=when, reason=reason)
    write_json(path, accepted.model_dump())
