"""A version's provenance, a comparison of two and a checkout as lines of text: one screen, at most 100 columns."""

from collections.abc import Iterable
from typing import Any

from darkroom.evaluation.protocol import Estimate, Protocol, ScoreRecord, SetScore
from darkroom.files import digest_json
from darkroom.registry.checkout import CheckedOut
from darkroom.registry.compare import Comparison, Figure, Side
from darkroom.registry.journal import Decision
from darkroom.registry.provenance import Provenance

WIDTH = 100
_LABEL = 12  # columns
_CHANGED = 6  # parameters that are listed
_HISTORY = 6  # decisions that are listed, the last ones
_REASONS = 4
_KEY_PARAMS = ("train.steps", "train.batch_size", "train.learning_rate", "sample.sampler", "sample.steps")
_FIGURES = {
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}


def lineage_lines(found: Provenance) -> list[str]:
    """What `darkroom lineage` shows; what is missing or does not fit together begins with "!"."""
    at = " ".join(f"@{alias}" for alias in found.aliases)
    by = f" by {found.registered_by}" if found.registered_by else ""
    data, record = found.data, found.record
    images = ", ".join(f"{number} {split}" for split, number in sorted(data.images.items(), reverse=True))
    facts = [
        ("registered", f"{found.registered_at}{by}"),
        ("commit", _commit(found.commit, found.dirty)),
        ("project", f"{_short(found.project)}   darkroom checkout models:/{found.name}/{found.version}"),
        ("data", _joined(data.source, _short(data.digest), images, "validated" if data.validated else "not validated")),
        ("dvc.lock", _joined(_short(found.lock), f"remote {found.remote}" if found.remote else "no remote")),
        ("run", _joined(found.run.run_id, found.run.status.lower())),
        ("weights", _joined(_short(found.weights), f"training {_short(found.fingerprint)}")),
    ]
    lines = [_cut(f"models:/{found.name}/{found.version}  {at}".rstrip())]
    lines += [_fact(label, text) for label, text in facts]
    lines += _params(found)
    if record is not None:
        lines += [_fact(label, text) for label, text in zip(("protocol", ""), _protocol(record.protocol), strict=True)]
        lines += _scores(record)
    lines += _verdict(found)
    lines += _history(found.history)
    return lines + [f"! {warning}" for warning in found.warnings]


def comparison_lines(found: Comparison) -> list[str]:
    """What `darkroom compare` shows: what they were made from, then each figure with its margin."""
    sides = (found.mine, found.theirs)
    rows = [("", *(_titled(side) for side in sides))]
    rows += [
        ("weights", *(_short(side.weights) for side in sides)),
        ("commit", *(_commit(side.commit, side.dirty) for side in sides)),
        ("data", *(_joined(side.data_source, _short(side.data_digest)) for side in sides)),
    ]
    lines = [_cut(f"{label:<{_LABEL}}{mine:<43} {theirs}".rstrip()) for label, mine, theirs in rows]
    lines.append(_fact("code", _code(found.code)))
    lines += _differing_params(found.params)
    lines += [
        f"{'protocol':<{_LABEL}}{_short(found.protocol)}",
        f"{'scores':<{_LABEL + 16}}{'first ± spread':>20}{'second ± spread':>20}{'difference':>12}{'margin':>9}",
        *(_compared(figure) for figure in found.figures),
        f"margin: {found.margin:g} standard errors of a difference, by the second's record, as the gate has it",
    ]
    return lines + [f"! {warning}" for warning in found.warnings]


def _fact(label: str, text: str) -> str:
    return _cut(f"{label:<{_LABEL}}{text}".rstrip())


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "?"


def _joined(*parts: str | None) -> str:
    return "   ".join(part for part in parts if part)


def _commit(commit: str | None, dirty: bool) -> str:
    if commit is None:
        return "none: it was registered outside git"
    return f"{commit[:12]}{', with uncommitted changes' if dirty else ''}"


def _params(found: Provenance) -> list[str]:
    if found.params is None:
        return [_fact("params", "?")]
    if found.changed is None:
        figures = [f"{key.partition('.')[2]} {value}" for key, value in _picked(found.params, _KEY_PARAMS)]
        return [_fact("params", _joined(digest_json(found.params)[:12], ", ".join(figures)))]
    if not found.changed:
        return [_fact("params", "as in this project now")]
    return _listed("params", [f"{key} {then} (here {now})" for key, (then, now) in found.changed.items()])


def _listed(label: str, entries: list[str]) -> list[str]:
    shown = entries[:_CHANGED]
    if len(entries) > _CHANGED:
        shown.append(f"and {len(entries) - _CHANGED} more: --json lists them")
    return [_fact(label if number == 0 else "", entry) for number, entry in enumerate(shown)]


def _picked(params: dict[str, Any], keys: Iterable[str]) -> list[tuple[str, Any]]:
    found = []
    for key in keys:
        group, _, name = key.partition(".")
        if isinstance(params.get(group), dict) and name in params[group]:
            found.append((key, params[group][name]))
    return found


def _protocol(protocol: Protocol) -> list[str]:
    """The fields in two lines; the digests shortened."""
    guided = f"guidance {protocol.guidance_scale:g}"
    if protocol.guidance_interval is not None:
        guided += f" at sigma {protocol.guidance_interval[0]:g} to {protocol.guidance_interval[1]:g}"
    drawn = f"{protocol.num_images} images × {len(protocol.seeds)} seeds, {protocol.sampler}, {protocol.steps} steps"
    against = f"{protocol.extractor} {protocol.extractor_weights[:8]}, {protocol.reference_images} {protocol.split}"
    return [
        f"{protocol.digest[:12]}   {drawn}, {guided}, {protocol.precision}",
        f"against {against} images of {protocol.data[:8]}, code {protocol.code[:8]}, resize {protocol.resize}",
    ]


def _scores(record: ScoreRecord) -> list[str]:
    heads = f"{'value':>10}{'spread':>10}{'95 % interval':>22}{'held-out real':>16}"
    lines = [f"{'scores':<{_LABEL + 16}}{heads}"]
    for place in ("unguided", "guided"):
        score: SetScore = getattr(record, place)
        for key, title in _FIGURES.items():
            estimate: Estimate | None = getattr(score, key)
            if estimate is not None:
                lines.append(_estimate(f"{place} {title}", estimate, getattr(record.floor, key)))
    copies = ", ".join(
        f"{place} {getattr(record, place).memorisation.near_copies:.2%}" for place in ("unguided", "guided")
    )
    raw = [] if record.raw_fid is None else [f"  unguided FID of the raw weights, without EMA: {record.raw_fid:.4g}"]
    return [*lines, *raw, f"  near copies of training images: {copies}; of new images it is 1 %"]


def _estimate(title: str, estimate: Estimate, floor: float | None) -> str:
    low_high = "" if estimate.low is None or estimate.high is None else f"{estimate.low:.4g} … {estimate.high:.4g}"
    spread = "" if estimate.spread is None else f"{estimate.spread:.2g}"
    real = "" if floor is None else f"{floor:.4g}"
    return f"  {title:<{_LABEL + 14}}{estimate.value:>10.4g}{spread:>10}{low_high:>22}{real:>16}".rstrip()


def _verdict(found: Provenance) -> list[str]:
    verdict = found.verdict
    if verdict is None:
        return [_fact("verdict", "none yet: `darkroom promote` asks the gate")]
    lines = [_fact("verdict", _joined(verdict.verdict, verdict.relation, verdict.when))]
    lines += [_fact("", f"because {reason}") for reason in verdict.reasons[:_REASONS]]
    more = len(verdict.reasons) - _REASONS
    return lines + ([_fact("", f"and {more} more: --json lists them")] if more > 0 else [])


def _history(history: list[Decision]) -> list[str]:
    if not history:
        return [_fact("history", "no decision yet")]
    shown = history[-_HISTORY:]
    label = "history" if len(shown) == len(history) else f"last {len(shown)}/{len(history)}"
    lines = []
    for number, entry in enumerate(shown):
        remark = f" ({entry.remark})" if entry.remark else ""
        reason = f": {entry.reason}" if entry.reason else ""
        text = f"{entry.when}   {entry.who}   {entry.outcome} {entry.route}{remark}{reason}"
        lines.append(_fact(label if number == 0 else "", text))
    return lines


def _titled(side: Side) -> str:
    return f"models:/{side.name}/{side.version} {' '.join(f'@{alias}' for alias in side.aliases)}".rstrip()


def _code(files: list[str] | None) -> str:
    if files is None:
        return "?"
    if not files:
        return "the same"
    names = ", ".join(name.removeprefix("src/darkroom/") for name in files)
    return f"{len(files)} {'file differs' if len(files) == 1 else 'files differ'}: {names}"


def _differing_params(params: dict[str, tuple[Any, Any]] | None) -> list[str]:
    if params is None:
        return [_fact("params", "?")]
    if not params:
        return [_fact("params", "the same")]
    return _listed("params", [f"{key:<30}{mine!s:<24} {theirs}" for key, (mine, theirs) in params.items()])


def _compared(figure: Figure) -> str:
    place, _, key = figure.name.partition(".")
    title = f"{place} {_FIGURES.get(key, key.replace('_', ' '))}"
    sides = (
        f"{value:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
        for value, spread in ((figure.mine, figure.mine_spread), (figure.theirs, figure.theirs_spread))
    )
    mine, theirs = sides
    margin = "" if figure.margin is None else f"{figure.margin:.2g}"
    note = {True: "  beyond", False: "  within", None: ""}[figure.beyond]
    return f"  {title:<{_LABEL + 14}}{mine:>20}{theirs:>20}{figure.difference:>+12.3g}{margin:>9}{note}"


def checkout_lines(done: CheckedOut) -> list[str]:
    """What a checkout did."""
    removed = (
        f", {len(done.removed)} removed that stages depend on and that were not there then" if done.removed else ""
    )
    lines = [
        f"{done.name} version {done.version} is in {done.root}",
        f"  {done.files} project files: {len(done.written)} brought, the rest was as it was{removed}",
        *(f"  DVC's remote {name!r} was added: {url}" for name, url in done.remotes.items()),
        *(f"  its data is also on {place}; --trust-remote '{place}' fetches from there" for place in done.refused),
        "  outputs: left as they were" if done.outputs is None else f"  {done.outputs} outputs of the pipeline",
    ]
    if done.head is not None:
        lines.append(f"  HEAD is unchanged: {done.head[:12]}")
    if done.commit is not None and done.dirty:
        lines.append(f"  it was registered from {done.commit[:12]} with uncommitted changes, which these files contain")
    elif done.commit is not None and done.head is not None and done.commit != done.head:
        lines.append(f"  the whole tree of its commit: git stash && git checkout {done.commit}")
    if done.outputs is None:
        lines.append("`darkroom checkout` without --no-data, or `dvc pull`, brings the outputs")
    elif not done.pending:
        lines.append("`dvc repro` has nothing to do")
    else:
        lines.append(f"`dvc repro` would run {', '.join(done.pending)} again, because DVC finds:")
        lines += [f"  ! {stage}: {what}" for stage, found in done.pending.items() for what in found]
    return lines
