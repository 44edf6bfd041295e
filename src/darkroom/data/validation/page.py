"""The validation page: one HTML file that opens offline. Everything that comes from the data is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.data.validation.charts import STYLE as CHART_STYLE
from darkroom.data.validation.charts import class_chart
from darkroom.data.validation.drift import NOTHING_ACCEPTED, Drift
from darkroom.data.validation.findings import CRITICAL, Finding
from darkroom.data.validation.thumbnails import STYLE as THUMBNAIL_STYLE
from darkroom.data.validation.thumbnails import Packed, examples, offender_figures

if TYPE_CHECKING:
    import pandas as pd

_CHANGES = 10  # classes in the table of drift

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --soft: #6b6b70; --line: #8884; --train: #3b6ea8;
  --test: #e0a030; --bad: #b3261e; --good: #1e7a4c; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --ink: #ececef; --paper: #17181a; --soft: #a0a0a6; --train: #6fa3dd;
  --test: #e6b455; --bad: #ff8a80; --good: #6fcf97; --warn: #f0c060 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p.sub, .sub { color: var(--soft); margin-top: .2rem } code { font-size: .85em; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; vertical-align: top; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 500 } tr { border-bottom: 1px solid var(--line) }
td:first-child { white-space: nowrap } td:last-child { overflow-wrap: normal }
.n { text-align: right; font-variant-numeric: tabular-nums }
.passed { color: var(--good) } .critical { color: var(--bad); font-weight: 600 }
.warning { color: var(--warn); font-weight: 600 }
details { margin: .3rem 0 } summary { cursor: pointer } li { overflow-wrap: anywhere }
"""


def render(
    info: DatasetInfo,
    manifest: pd.DataFrame,
    findings: list[Finding],
    figures: dict[str, Any],
    splits: dict[str, Split],
    drift: Drift | None,
) -> str:
    """The page's HTML. `figures` are the counts of `validation.json`, `splits` give the thumbnails.

    `drift` is from the accepted data set, None where there is none.
    """
    packed = Packed(manifest, splits)
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(info.splits.items(), reverse=True))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(info.name)}: data validation</title><style>{_STYLE}{CHART_STYLE}{THUMBNAIL_STYLE}</style></head><body>
<h1>{escape(info.name)}: {_verdict(findings)}</h1>
<p class="sub">{counts}; {figures["undecodable"]:,} undecodable; {info.image_size} × {info.image_size},
{"grey" if info.channels == 1 else "RGB"}; digest <code>{info.digest[:12]}</code></p>
<h2>Expectations</h2>
{_table(findings)}
{_offenders(findings, packed)}
<h2>Images per class</h2>
{class_chart(figures["per_class"], info.classes, info.splits)}
<h2>Examples</h2>
{examples(info, splits["train"])}
<h2>Drift from the accepted data set</h2>
{_drift(drift)}
<h2>Source files</h2>
{_sources(manifest)}
</body></html>
"""


def _verdict(findings: list[Finding]) -> str:
    critical = sum(not finding.success and finding.severity == CRITICAL for finding in findings)
    warnings = sum(not finding.success and finding.severity != CRITICAL for finding in findings)
    verdict = '<span class="passed">good</span>'
    if critical:
        verdict = f'<span class="critical">refused: {critical} critical</span>'
    if warnings:
        verdict += f', <span class="warning">{warnings} warning{"s" if warnings > 1 else ""}</span>'
    return verdict


def _table(findings: list[Finding]) -> str:
    rows = []
    for finding in findings:
        verdict = "passed" if finding.success else escape(finding.severity)
        texts = "".join(f"<td>{escape(text)}</td>" for text in (finding.name, finding.expected, finding.observed))
        rows.append(f'<tr>{texts}<td class="{verdict}">{verdict}</td></tr>')
    return f"<table><tr><th>name<th>expected<th>found<th>verdict</tr>{''.join(rows)}</table>"


def _offenders(findings: list[Finding], packed: Packed) -> str:
    """Failed ones first, critical before warnings; then what is there within a limit."""
    named = [finding for finding in findings if finding.offenders]
    named.sort(key=lambda finding: (finding.success, finding.severity != CRITICAL))
    if not named:
        return ""
    return f"<h2>Offenders</h2>{''.join(_offenders_of(finding, packed) for finding in named)}"


def _offenders_of(finding: Finding, packed: Packed) -> str:
    verdict = "within the limit" if finding.success else finding.severity
    kind = "passed" if finding.success else escape(finding.severity)
    lines = "".join(
        f"<li><code>{escape(o.name)}</code>{': ' + escape(o.reason) if o.reason else ''}</li>"
        for o in finding.offenders
    )
    more = finding.count - len(finding.offenders)
    rest = f"<li>and {more:,} more</li>" if more > 0 else ""
    pictures = offender_figures(finding.offenders, packed)
    # Without pictures, because they could not be decoded, the list is all there is to see.
    opened = "" if pictures else " open"
    return (
        f'<h3>{escape(finding.name)}: {finding.count:,} <span class="{kind}">({escape(verdict)})</span></h3>'
        f'<p class="sub">expected {escape(finding.expected)}</p>{pictures}'
        f"<details{opened}><summary>{len(finding.offenders)} by name</summary><ul>{lines}{rest}</ul></details>"
    )


def _drift(drift: Drift | None) -> str:
    if drift is None:
        return f"<p>{escape(NOTHING_ACCEPTED)}</p>"
    title = f"{escape(drift.accepted_name)}, digest <code>{drift.accepted_digest[:12]}</code>"
    if drift.same:
        return f"<p>This is the accepted data set: {title}.</p>"
    parts = [f"<p>Against {title}.</p>"]
    parts += [f'<p class="warning">Not comparable: {escape(reason)}.</p>' for reason in drift.reasons]
    if drift.class_drift is not None and drift.classes:
        rows = "".join(
            f'<tr><td>{escape(c.name)}</td><td class="n">{c.accepted:.2%}</td><td class="n">{c.current:.2%}</td>'
            f'<td class="n">{c.current - c.accepted:+.2%}</td></tr>'
            for c in drift.classes[:_CHANGES]
        )
        head = "<tr><th>class share<th class=n>accepted<th class=n>now<th class=n>change</tr>"
        more = len(drift.classes) - _CHANGES
        rest = f'<p class="sub">and {more:,} classes that changed less</p>' if more > 0 else ""
        parts.append(f"<table>{head}{rows}</table>{rest}")
    if drift.channels:
        rows = "".join(
            f'<tr><td>{escape(c.name)}</td><td class="n">{c.accepted_mean:.2f} ± {c.accepted_std:.2f}</td>'
            f'<td class="n">{c.current_mean:.2f} ± {c.current_std:.2f}</td><td class="n">{c.drift:.4f}</td></tr>'
            for c in drift.channels
        )
        head = "<tr><th>channel, mean ± deviation<th class=n>accepted<th class=n>now<th class=n>drift</tr>"
        parts.append(f"<table>{head}{rows}</table>")
    return "".join(parts)


def _sources(manifest: pd.DataFrame) -> str:
    """How many files of each format, mode and range of sizes."""
    groups = manifest.groupby(["format", "mode"], sort=True, dropna=False)
    sides = groups[["width", "height"]].agg(["min", "max"])
    rows = []
    for (key, count), average in zip(groups.size().items(), groups["bytes"].mean(), strict=True):
        names = "".join(f"<td>{escape(str(text)) if text else 'unknown'}</td>" for text in key)  # type: ignore[attr-defined]
        width, height = (_span(*sides.loc[key, side]) for side in ("width", "height"))  # type: ignore[index]
        rows.append(
            f'<tr>{names}<td>{width} × {height}</td><td class="n">{average:,.0f}</td><td class=n>{count:,}</tr>'
        )
    head = "<tr><th>format<th>mode<th>width × height<th class=n>average bytes<th class=n>files</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _span(low: float, high: float) -> str:
    """A range of sizes, in pixels."""
    if low != low:
        return "?"
    return str(int(low)) if low == high else f"{int(low)}–{int(high)}"
