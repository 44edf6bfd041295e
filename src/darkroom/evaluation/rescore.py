"""Scoring a model that is not the pipeline's own: a champion under a protocol it was never measured by."""

from pathlib import Path

from darkroom.diffusion.model import DiffusionModel
from darkroom.evaluation.drawing import draw_samples
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.evaluation.score import score_samples
from darkroom.params import EvaluateParams, SampleParams


def score_model(
    model: DiffusionModel, extractor_dir: Path, sample: SampleParams, evaluate: EvaluateParams
) -> ScoreRecord:
    """Draw and score: what the pipeline does in two stages, for a model that comes from elsewhere."""
    return score_samples(draw_samples(model, sample), extractor_dir, evaluate)
