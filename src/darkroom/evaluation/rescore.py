"""Scoring a model that is not the pipeline's own: a champion under a protocol it was never measured by."""

from collections.abc import Callable
from pathlib import Path

from darkroom.diffusion.model import DiffusionModel
from darkroom.evaluation.drawing import draw_samples
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.evaluation.score import score_samples
from darkroom.params import EvaluateParams, SampleParams


def score_model(
    model: DiffusionModel,
    extractor_dir: Path,
    sample: SampleParams,
    evaluate: EvaluateParams,
    progress: Callable[[int], None] | None = None,
) -> ScoreRecord:
    """Draw and score: what the pipeline does in two stages, for a model that comes from elsewhere with EMA weights.

    `progress` counts drawn images, up to `drawing.num_draws(sample, raw=False)`.
    """
    samples = draw_samples(model, sample, progress=progress)
    assert samples is not None  # there is one process
    device = next(model.network.parameters()).device
    scored = score_samples(samples, extractor_dir, evaluate, device=device)
    assert scored is not None
    return scored.record
