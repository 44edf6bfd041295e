"""The class histogram of the validation page, as SVG."""

from collections.abc import Mapping
from html import escape

FEW = 30  # classes that a page shows one by one; more are folded up

STYLE = """
svg { max-width: 100%; height: auto; display: block } svg text { fill: currentColor; font-size: 12px }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .8em }
"""
_KEY = (
    '<p class="sub"><span class="key" style="background: var(--train)"></span>train'
    '<span class="key" style="background: var(--test)"></span>test</p>'
)
_WIDTH, _LINE, _HEIGHT = 760, 22, 140


def class_chart(per_class: Mapping[str, Mapping[str, int]], classes: list[str], splits: Mapping[str, int]) -> str:
    """A bar per class: train, then test. Many classes: all in one chart by size, and the bars folded up.

    `per_class` gives the images of each class and split, `splits` those of unlabelled data.
    """
    if not classes:
        return (
            f"<p>{sum(splits.values()):,} images without labels: {splits['train']:,} train, {splits['test']:,} test</p>"
        )
    counts = [(name, per_class[name]["train"], per_class[name]["test"]) for name in classes]
    bars = _bars(counts) + _KEY
    if len(classes) <= FEW:
        return bars
    return f"{_overview(counts)}<details><summary>all {len(classes):,} classes</summary>{bars}</details>"


def _bars(counts: list[tuple[str, int, int]]) -> str:
    largest = max(train + test for _, train, test in counts) or 1
    parts = []
    for i, (name, train, test) in enumerate(counts):
        wide, narrow, y = 500 * train / largest, 500 * test / largest, i * _LINE
        label = name if len(name) <= 20 else name[:19] + "…"
        parts.append(
            f'<text x="0" y="{y + 15}">{escape(label)}<title>{escape(name)}</title></text>'
            f'<rect x="150" y="{y + 3}" width="{wide:.1f}" height="16" fill="var(--train)"/>'
            f'<rect x="{150 + wide:.1f}" y="{y + 3}" width="{narrow:.1f}" height="16" fill="var(--test)"/>'
            f'<text x="{158 + wide + narrow:.1f}" y="{y + 15}">{train:,} + {test:,}</text>'
        )
    return _svg("".join(parts), _LINE * len(counts), "images per class")


def _overview(counts: list[tuple[str, int, int]]) -> str:
    """The number of images of every class as one outline, the largest class first."""
    sizes = sorted((train + test for _, train, test in counts), reverse=True)
    largest, step = sizes[0] or 1, _WIDTH / len(sizes)
    outline = [f"0,{_HEIGHT}"]
    for i, size in enumerate(sizes):
        y = _HEIGHT * (1 - size / largest)
        outline += [f"{i * step:.2f},{y:.1f}", f"{(i + 1) * step:.2f},{y:.1f}"]
    area = f'<polygon points="{" ".join([*outline, f"{_WIDTH},{_HEIGHT}"])}" fill="var(--train)"/>'
    ordered = sorted(counts, key=lambda count: -count[1] - count[2])
    ends = (("largest", ordered[0]), ("median", ordered[len(ordered) // 2]), ("smallest", ordered[-1]))
    words = "; ".join(f"{word} {train + test:,} ({escape(name)})" for word, (name, train, test) in ends)
    chart = _svg(area, _HEIGHT, "images per class, the largest class first")
    return f'{chart}<p class="sub">{len(counts):,} classes by number of images: {words}</p>'


def _svg(content: str, height: int, label: str) -> str:
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    return f'<svg {size} role="img" aria-label="{label}">{content}</svg>'
