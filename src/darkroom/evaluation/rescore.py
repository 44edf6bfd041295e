"""Scoring a model that is not the pipeline's own: a champion under a protocol it was never measured by."""

from collections.abc import Callable
from pathlib import Path

from darkroom.diffusion.model import DiffusionModel
from darkroom.evaluation.code import code_digest
from darkroom.evaluation.drawing import draw_samples
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.protocol import Protocol, ScoreRecord
from darkroom.evaluation.reference import Reference, Statistics
from darkroom.evaluation.score import score_samples
from darkroom.params import DrawParams, EvaluateParams, SampleParams


def score_model(
    model: DiffusionModel,
    extractor_dir: Path,
    sample: SampleParams,
    evaluate: EvaluateParams,
    progress: Callable[[int], None] | None = None,
) -> ScoreRecord:
    """Draw and score: what the pipeline does in two stages, for a model that comes from elsewhere with EMA weights.

    `progress` counts drawn images, up to `drawing.num_draws(…, raw=False)`.
    """
    samples = draw_samples(model, sample, Statistics.read(extractor_dir).class_counts, progress=progress)
    assert samples is not None  # there is one process
    device = next(model.network.parameters()).device
    scored = score_samples(samples, extractor_dir, evaluate, device=device)
    assert scored is not None
    return scored.record


def protocol_of(extractor_dir: Path, sample: SampleParams, evaluate: EvaluateParams) -> Protocol:
    """The protocol that `score_model` measures under, before anything is drawn.

    Raises InputError if the extractor or the reference is not there.
    """
    card, statistics = Extractor.load(extractor_dir).card, Reference.load(extractor_dir).statistics
    return Protocol(
        code=code_digest(),
        extractor=card.kind,
        extractor_weights=card.weights_digest,
        classifier=card.classifier_digest,
        data=statistics.data_digest,
        reference=statistics.features_digest,
        reference_images=statistics.num_images,
        published_statistics=statistics.published_statistics,
        num_images=sample.num_images,
        seeds=sample.seeds,
        **{name: getattr(sample, name) for name in DrawParams.model_fields},
        resize=card.resize,
        kid_subsets=evaluate.kid_subsets,
        kid_subset_size=evaluate.kid_subset_size,
        neighbours=evaluate.neighbours,
    )
