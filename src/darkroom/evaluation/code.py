"""The code that a score depends on beside parameters, weights and reference."""

from pathlib import Path

from darkroom.files import digest_tree

_PACKAGE = Path(__file__).resolve().parents[1]
CODE = (
    "diffusion",
    "evaluation/distances.py",
    "evaluation/drawing.py",
    "evaluation/extraction.py",
    "evaluation/features.py",
    "evaluation/labels.py",
    "evaluation/memorisation.py",
    "evaluation/neighbours.py",
    "evaluation/score.py",
    "evaluation/uncertainty.py",
    "nets",
    "philox.py",
    "randomness.py",
)


def code_digest() -> str:
    """Digest of the code that draws and measures, as it is now."""
    return digest_tree(_PACKAGE, [_PACKAGE / part for part in CODE])
