"""Two versions side by side: what they were made from, and their scores under a protocol that both have."""

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError
from darkroom.evaluation.protocol import Estimate, ScoreRecord, SetScore
from darkroom.registry.gate import ProtocolMismatch, fid_error, require_same_protocol, share_error
from darkroom.registry.lineage import SCORES
from darkroom.registry.provenance import differences, params_of, read_project
from darkroom.registry.tracking import connect, current, tracking_uri, unavailable_is_one_line
from darkroom.registry.versions import PROTOCOL_TAG, WEIGHTS_TAG, find_by_uri, stored_scores
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_MARGIN = 2.0  # standard errors, where no parameters say otherwise
_PROJECT_CODE = "src/"


@dataclass(frozen=True)
class Side:
    """What one version was made from. Digests are sha256."""

    name: str
    version: str
    aliases: list[str]
    weights: str | None
    commit: str | None
    dirty: bool
    data_source: str | None
    data_digest: str | None
    measuring_code: str | None  # digest of what draws and measures


@dataclass(frozen=True)
class Figure:
    """One figure of both. `margin` is what a difference has to exceed to count; None: there is no spread to tell."""

    name: str
    mine: float
    mine_spread: float | None  # standard deviation over seeds
    theirs: float
    theirs_spread: float | None
    margin: float | None

    @property
    def difference(self) -> float:
        return self.mine - self.theirs

    @property
    def beyond(self) -> bool | None:
        """Whether the difference is larger than chance explains."""
        return None if self.margin is None else abs(self.difference) > self.margin


@dataclass(frozen=True)
class Comparison:
    """The first version against the second."""

    mine: Side
    theirs: Side
    params: dict[str, tuple[Any, Any]] | None  # those that differ; None if a version's are not to be had
    code: list[str] | None  # the files that differ
    protocol: str  # digest of the one that both were scored under
    margin: float  # standard errors of a difference
    figures: list[Figure]
    warnings: list[str]


def compare(workspace: Workspace, uri: str, other: str) -> Comparison:
    """Compare the version at `uri` with the one at `other`, as the gate compares a challenger with a champion.

    The margin is the gate's: it comes from the second version's record alone. Raises InputError if there is no such
    version, or no protocol that both were scored under; RegistryUnavailable if the server does not answer.
    """
    client, tracking = connect(workspace), tracking_uri(workspace)
    with unavailable_is_one_line(tracking), current(tracking):
        versions = [find_by_uri(client, each) for each in (uri, other)]
        mine, theirs = common_records(*versions)
        projects = [read_project(client, version) for version in versions]
    warnings = [
        f"version {version.version}: {line}"
        for version, (_, lines) in zip(versions, projects, strict=True)
        for line in lines
    ]
    files = [files for files, _ in projects]
    params = [params_of(each) for each in files]
    margin, scatter = _margin(workspace, params[1])
    return Comparison(
        mine=_side(versions[0], mine),
        theirs=_side(versions[1], theirs),
        params=None if params[0] is None or params[1] is None else differences(params[0], params[1]),
        code=_differing_code(files[0], files[1]) if all(files) else None,
        protocol=theirs.protocol_digest,
        margin=margin,
        figures=compare_figures(mine, theirs, margin, scatter),
        warnings=warnings,
    )


def common_records(mine: "ModelVersion", theirs: "ModelVersion") -> tuple[ScoreRecord, ScoreRecord]:
    """The records of both under one protocol: the second's own if possible, then the first's, then any.

    Raises InputError, naming what differs, if there is none.
    """
    records = [stored_scores(version) for version in (mine, theirs)]
    advice = "`darkroom score URI` measures a version under the current protocol"
    for version, found in zip((mine, theirs), records, strict=True):
        if not found:
            raise InputError(f"models:/{version.name}/{version.version} has no score; {advice}")
    own = [version.tags.get(PROTOCOL_TAG, "") for version in (theirs, mine)]
    for protocol in (*own, *sorted(records[0])):
        if protocol in records[0] and protocol in records[1]:
            return records[0][protocol], records[1][protocol]
    first = [next((found[p] for p in own if p in found), next(iter(found.values()))) for found in records]
    try:
        require_same_protocol(*first)
    except ProtocolMismatch as error:
        raise InputError(f"{error}; {advice}") from None
    raise AssertionError("equal protocols are common ones")


def compare_figures(mine: ScoreRecord, theirs: ScoreRecord, margin: float, scatter: float) -> list[Figure]:
    """The figures of two records of one protocol; `margin` and `scatter` as in the gate's policy."""
    protocol = theirs.protocol
    real = protocol.reference_images // len(protocol.seeds)  # the same ones for each seed: together they count once
    counts = {"precision": protocol.num_images, "recall": real, "class_accuracy": protocol.num_images}
    figures = []
    for place in ("unguided", "guided"):
        one: SetScore = getattr(mine, place)
        other: SetScore = getattr(theirs, place)
        for key in SCORES:
            left: Estimate | None = getattr(one, key)
            right: Estimate | None = getattr(other, key)
            if left is None or right is None:
                continue
            error = fid_error(other, scatter) if key == "fid" else _error(right, counts.get(key))
            allowed = None if error is None else margin * sqrt(2) * error
            name = f"{place}.{key}"
            figures.append(Figure(name, left.value, left.spread, right.value, right.spread, allowed))
        for name, values in _without_spread(one, other).items():
            figures.append(Figure(f"{place}.{name}", values[0], None, values[1], None, None))
    return figures


def _without_spread(one: SetScore, other: SetScore) -> dict[str, tuple[float, float]]:
    found = {
        "fid_infinity": (one.fid_infinity, other.fid_infinity),
        "near_copies": (one.memorisation.near_copies, other.memorisation.near_copies),
    }
    if one.class_accuracies and other.class_accuracies:
        found["worst_class_accuracy"] = min(one.class_accuracies), min(other.class_accuracies)
    return found


def _error(estimate: Estimate, count: int | None) -> float | None:
    """Standard error of a mean over seeds: of a share of `count` images each, or of anything else from its spread."""
    if count is not None:
        return share_error(estimate, count)
    return None if estimate.spread is None else estimate.spread / sqrt(len(estimate.seeds))


def _margin(workspace: Workspace, params: dict[str, Any] | None) -> tuple[float, float]:
    """The gate's margin and retraining scatter: this project's, else those of the second version's registration."""
    if workspace.params_file.is_file():
        gate = workspace.params().registry.gate
        return gate.margin, gate.retraining_scatter
    try:
        known = (params or {})["registry"]["gate"]
        return float(known["margin"]), float(known.get("retraining_scatter", 0.0))
    except (KeyError, TypeError, ValueError):
        return _MARGIN, 0.0


def _side(version: "ModelVersion", record: ScoreRecord) -> Side:
    tags = version.tags
    return Side(
        name=str(version.name),
        version=str(version.version),
        aliases=sorted(version.aliases),
        weights=tags.get(WEIGHTS_TAG),
        commit=tags.get("darkroom.git_commit"),
        dirty=tags.get("darkroom.git_dirty") == "true",
        data_source=tags.get("darkroom.data_source"),
        data_digest=tags.get("darkroom.data_digest"),
        measuring_code=record.protocol.code,
    )


def _differing_code(mine: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    names = sorted(name for name in mine.keys() | theirs.keys() if name.startswith(_PROJECT_CODE))
    return [name for name in names if mine.get(name) != theirs.get(name)]
