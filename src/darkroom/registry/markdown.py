"""Markdown as text: tables, lists, and figures and names as they stand in them."""

from collections.abc import Iterable, Sequence


def bullets(lines: Iterable[str]) -> list[str]:
    """A list with a point for each line."""
    return [f"- {line}" for line in lines]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose first column is text and whose others are figures."""
    ruler = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ruler, *rows)]


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def interval(low: float, high: float) -> str:
    """Both ends, in brackets."""
    return f"[{number(low)}, {number(high)}]"


def percent(share: float) -> str:
    """A share of 1 as a percentage."""
    return f"{100 * share:.4g} %"


def code(text: str) -> str:
    """Text as it is, between backticks."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def escaped(text: str) -> str:
    """Text that has no meaning in Markdown or HTML, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in text)
