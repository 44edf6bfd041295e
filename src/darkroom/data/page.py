"""The validation page: one HTML file that opens offline. Everything that comes from the data is escaped."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darkroom.data.dataset import DatasetInfo, Split
from darkroom.data.validation import CRITICAL, SHOWN, Finding

if TYPE_CHECKING:
    import pandas as pd

_PER_CLASS = 10  # thumbnails
_CLASSES = 50  # classes shown; the statistics count all
_SIDE = 48  # of a thumbnail on the page, in CSS pixels

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --train: #3b6ea8; --test: #e0a030;
  --bad: #c43c3c; --good: #2e8b57 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
p.sub { color: #888; margin-top: .2rem } code { font-size: .85em }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top }
tr { border-bottom: 1px solid var(--line) } td:nth-child(n+3) { white-space: nowrap }
.n { text-align: right; font-variant-numeric: tabular-nums }
.passed { color: var(--good) } .critical { color: var(--bad); font-weight: 600 }
.warning { color: var(--test); font-weight: 600 }
.thumbs { display: flex; gap: 4px; align-items: center; margin: 4px 0 } .thumbs b { width: 9rem; overflow: hidden;
  text-overflow: ellipsis; font-weight: 500 } .thumbs img { image-rendering: pixelated; border-radius: 3px }
details { margin: .3rem 0 } li { overflow-wrap: anywhere } svg text { fill: currentColor; font-size: 12px }
"""


def render(
    info: DatasetInfo, manifest: pd.DataFrame, findings: list[Finding], statistics: dict[str, Any], train: Split
) -> str:
    """The page's HTML. `statistics` is what `validation.json` holds, `train` gives the thumbnails."""
    critical = [f for f in findings if not f.success and f.severity == CRITICAL]
    warnings = [f for f in findings if not f.success and f.severity != CRITICAL]
    if critical:
        verdict = f'<span class="critical">refused: {len(critical)} critical</span>'
    else:
        verdict = '<span class="passed">accepted</span>'
    if warnings:
        verdict += f', <span class="warning">{len(warnings)} warning{"s" if len(warnings) > 1 else ""}</span>'
    splits = ", ".join(f"{count:,} {name}" for name, count in sorted(info.splits.items(), reverse=True))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(info.name)}: data validation</title><style>{_STYLE}</style></head><body>
<h1>{escape(info.name)}: {verdict}</h1>
<p class="sub">{splits}; {statistics["undecodable"]:,} undecodable; {info.image_size} × {info.image_size},
{"grey" if info.channels == 1 else "RGB"}; digest <code>{info.digest[:12]}</code></p>
<h2>Expectations</h2>
{_table(findings)}
{"".join(_offenders(finding) for finding in [*critical, *warnings])}
<h2>Images per class</h2>
{_histogram(statistics["per_class"], info.classes)}
<h2>Examples</h2>
{_thumbnails(info, train)}
<h2>Source files</h2>
{_sources(manifest)}
</body></html>
"""


def _table(findings: list[Finding]) -> str:
    rows = []
    for finding in findings:
        verdict = "passed" if finding.success else escape(finding.severity)
        texts = "".join(f"<td>{escape(text)}</td>" for text in (finding.name, finding.expected, finding.observed))
        rows.append(f'<tr>{texts}<td class="{verdict}">{verdict}</td></tr>')
    return f"<table><tr><th>name<th>expected<th>found<th>verdict</tr>{''.join(rows)}</table>"


def _offenders(finding: Finding) -> str:
    if not finding.offenders:
        return ""
    named = "".join(
        f"<li><code>{escape(o.name)}</code>{': ' + escape(o.reason) if o.reason else ''}</li>"
        for o in finding.offenders[:SHOWN]
    )
    more = len(finding.offenders) - SHOWN
    rest = f"<li>and {more:,} more</li>" if more > 0 else ""
    opened = " open" if finding.severity == CRITICAL else ""
    summary = f"{escape(finding.name)}: {len(finding.offenders):,}"
    return f"<details{opened}><summary>{summary}</summary><ul>{named}{rest}</ul></details>"


def _histogram(per_class: dict[str, dict[str, int]], classes: list[str]) -> str:
    """A horizontal bar per class: train, then test."""
    shown = classes[:_CLASSES]
    largest = max([sum(per_class[name].values()) for name in classes] or [1]) or 1
    height, bars = 22, []
    for i, name in enumerate(shown):
        train, test = per_class[name]["train"], per_class[name]["test"]
        wide, narrow, y = 500 * train / largest, 500 * test / largest, i * height
        label = name if len(name) <= 20 else name[:19] + "…"
        bars.append(
            f'<text x="0" y="{y + 15}">{escape(label)}</text>'
            f'<rect x="150" y="{y + 3}" width="{wide:.1f}" height="16" fill="var(--train)"/>'
            f'<rect x="{150 + wide:.1f}" y="{y + 3}" width="{narrow:.1f}" height="16" fill="var(--test)"/>'
            f'<text x="{158 + wide + narrow:.1f}" y="{y + 15}">{train:,} + {test:,}</text>'
        )
    size = f'width="760" height="{height * len(shown)}" viewBox="0 0 760 {height * len(shown)}"'
    chart = f'<svg {size} role="img" aria-label="images per class">{"".join(bars)}</svg>'
    return f'{chart}{_others(classes)}<p class="sub">blue: train, yellow: test</p>'


def _others(classes: list[str]) -> str:
    return f"<p>… and {len(classes) - _CLASSES:,} more classes</p>" if len(classes) > _CLASSES else ""


def _thumbnails(info: DatasetInfo, train: Split) -> str:
    lines = []
    for label, name in enumerate(info.classes[:_CLASSES]):
        images = "".join(
            f'<img src="{_data_uri(train.images[i])}" width="{_SIDE}" height="{_SIDE}" alt="{escape(name)}">'
            for i in np.flatnonzero(train.labels == label)[:_PER_CLASS]
        )
        lines.append(f'<div class="thumbs"><b title="{escape(name)}">{escape(name)}</b>{images}</div>')
    return "".join(lines) + _others(info.classes)


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """A (C, H, W) image as a PNG inside the page, at most twice the size at which it is shown."""
    from PIL import Image

    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((2 * _SIDE, 2 * _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sources(manifest: pd.DataFrame) -> str:
    """How many files of each format, mode and range of sizes."""
    rows = []
    for (form, mode), group in manifest.groupby(["format", "mode"], sort=True):
        sides = [group[side].dropna() for side in ("width", "height")]
        span = " × ".join(_span(side) for side in sides)
        average = f"{group['bytes'].mean():,.0f}"
        cells = f"<td>{escape(str(form) or 'unknown')}</td><td>{escape(str(mode) or 'unknown')}</td><td>{span}</td>"
        rows.append(f'<tr>{cells}<td class="n">{average}</td><td class="n">{len(group):,}</td></tr>')
    head = "<tr><th>format<th>mode<th>width × height<th class=n>average bytes<th class=n>files</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _span(side: pd.Series[float]) -> str:
    """The range of known sizes, in pixels."""
    if side.empty:
        return "?"
    low, high = int(side.min()), int(side.max())
    return str(low) if low == high else f"{low}–{high}"
