"""From samples to a score record."""

from pathlib import Path

from torch import Tensor

from darkroom.evaluation.distances import KID, ReferenceDistance
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.protocol import Protocol, RealScore, ScoreRecord, SetScore
from darkroom.evaluation.reference import Reference
from darkroom.evaluation.samples import SampleSet
from darkroom.files import digest_tree
from darkroom.params import DrawParams, EvaluateParams

# What a score depends on beside parameters, weights and reference.
_PACKAGE = Path(__file__).resolve().parents[1]
CODE = (
    "diffusion",
    "evaluation/distances.py",
    "evaluation/drawing.py",
    "evaluation/features.py",
    "evaluation/score.py",
    "nets",
    "philox.py",
    "randomness.py",
)


def code_digest() -> str:
    """Digest of the code that draws and measures, as it is now."""
    return digest_tree(_PACKAGE, [_PACKAGE / part for part in CODE])


def score_samples(samples: SampleSet, extractor_dir: Path, evaluate: EvaluateParams) -> ScoreRecord:
    """Score samples against the reference in `extractor_dir`."""
    extractor, reference = Extractor.load(extractor_dir), Reference.load(extractor_dir)
    distance, params = ReferenceDistance(reference.features), samples.params

    def kid(features: Tensor) -> KID:
        size = min(evaluate.kid_subset_size, len(features) - 1, len(reference.features) - 1)
        return distance.kid(features, evaluate.kid_subsets, size, params.seed)

    def score(images: Tensor, guidance_scale: float) -> SetScore:
        features = extractor(images)
        found = kid(features)
        return SetScore(
            guidance_scale=guidance_scale,
            fid=distance.fid(features),
            kid=found.mean,
            kid_std=found.std,
            class_accuracy=extractor.class_accuracy(images, samples.labels),
        )

    protocol = Protocol(
        code=code_digest(),
        extractor=extractor.card.weights_digest,
        reference=reference.statistics.features_digest,
        num_images=len(samples.labels),
        **{name: getattr(params, name) for name in DrawParams.model_fields},
        seed=params.seed,
        kid_subsets=evaluate.kid_subsets,
        kid_subset_size=evaluate.kid_subset_size,
    )
    floor_kid = kid(reference.held_out)
    return ScoreRecord(
        weights_digest=samples.weights_digest,
        finite=samples.finite,
        unguided=score(samples.unguided, 1.0),
        guided=score(samples.guided, params.guidance_scale),
        floor=RealScore(
            num_images=reference.statistics.floor_num_images,
            fid=reference.statistics.floor_fid,
            kid=floor_kid.mean,
            kid_std=floor_kid.std,
            class_accuracy=reference.statistics.floor_class_accuracy,
        ),
        scale=reference.statistics.scale,
        protocol=protocol,
        protocol_digest=protocol.digest,
    )
