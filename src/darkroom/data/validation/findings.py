"""What the validation says: findings, who offends, and the messages made of them."""

from dataclasses import dataclass
from typing import Any

CRITICAL, WARNING = "critical", "warning"
SHOWN = 20  # offenders named in the reports; the count is always of all


@dataclass(frozen=True)
class Offender:
    """A row, or a class, that fails an expectation."""

    name: str
    reason: str
    row: int | None = None  # position in the manifest; None for a class
    partner: int | None = None  # row of the image that it looks like


@dataclass(frozen=True)
class Finding:
    """What became of one expectation."""

    name: str
    severity: str
    expected: str
    success: bool
    observed: str
    count: int = 0  # of rows or classes that offend; where some are allowed, also when the expectation holds
    offenders: tuple[Offender, ...] = ()  # the first SHOWN of them
    compares: bool = False  # with the accepted data set: says nothing about this data set alone

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "severity": self.severity,
            "expected": self.expected,
            "success": self.success,
            "observed": self.observed,
            "unexpected": self.count,
            "rows": [{"name": o.name, "reason": o.reason} for o in self.offenders],
        }

    def sentence(self, shown: int) -> str:
        """What was expected and what was found: how many, and the first `shown` with their reasons."""
        if not self.offenders:
            return f"expected {self.expected}, found: {self.observed}"
        named = [f"{o.name} ({o.reason})" if o.reason else o.name for o in self.offenders[:shown]]
        more = f"; and {self.count - len(named):,} more" if self.count > len(named) else ""
        return f"expected {self.expected}, found {self.count:,}: {'; '.join(named)}{more}"


def failure_message(dataset: str, findings: list[Finding], shown: int = 5) -> str:
    """A line per failed critical expectation; empty when there is none."""
    return "\n".join(
        f'dataset {dataset}: expectation "{finding.name}" failed: {finding.sentence(shown)}'
        for finding in findings
        if not finding.success and finding.severity == CRITICAL
    )


def word(value: object) -> str:
    """A value for a message: short, one line, nothing that a terminal would obey."""
    if value is None or value != value:
        return "missing"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if text.isprintable() else repr(text)
