"""From samples to a score record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darkroom.evaluation.code import code_digest
from darkroom.evaluation.distances import ReferenceDistance
from darkroom.evaluation.extraction import Features, extract, joined
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.memorisation import ClosestPair, measure_memorisation
from darkroom.evaluation.neighbours import Manifold, precision_recall
from darkroom.evaluation.protocol import Protocol, RealScore, ScoreRecord, SetScore
from darkroom.evaluation.reference import Reference
from darkroom.evaluation.samples import SampleSet
from darkroom.evaluation.sharing import Sharing
from darkroom.evaluation.uncertainty import fid_deviation, fid_infinity, over_seeds
from darkroom.params import DrawParams, EvaluateParams

NUM_PAIRS = 16  # of a sample and the training image it is nearest to, for a picture


@dataclass(frozen=True)
class Scored:
    """A record, and the pairs of a sample and a training image that are nearest to each other, nearest first."""

    record: ScoreRecord
    closest: list[ClosestPair]  # `sample` counts through the unguided sets of all seeds, one after the other


def score_samples(
    samples: SampleSet,
    extractor_dir: Path,
    evaluate: EvaluateParams,
    *,
    device: torch.device | str = "cpu",
    sharing: Sharing | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scored | None:
    """Score samples against the reference in `extractor_dir`.

    On several processes, which share the extraction of features, the first one gets the scores and the others None.
    `progress` counts images, up to `num_measured(samples)`.
    """
    extractor = Extractor.load(extractor_dir, device)
    done = 0

    def measured(images: Tensor) -> Features | None:
        nonlocal done
        before, done = done, done + len(images)
        return extract(extractor, images, sharing, (lambda n: progress(before + n)) if progress else None)

    unguided = [measured(images) for images in samples.unguided]
    guided = unguided
    if not samples.guided_is_unguided:
        guided = [measured(samples.guided)]
    raw = None if samples.raw is None else measured(samples.raw)
    sets = [[found for found in features if found is not None] for features in (unguided, guided)]
    if not sets[0]:
        return None
    return _Scoring(samples, extractor, Reference.load(extractor_dir), evaluate).score(sets[0], sets[1], raw)


def num_measured(samples: SampleSet) -> int:
    """How many images `score_samples` measures."""
    sets = len(samples.unguided) + (not samples.guided_is_unguided) + (samples.raw is not None)
    return sets * len(samples.labels)


class _Scoring:
    """What all sets of one model have in common."""

    def __init__(
        self, samples: SampleSet, extractor: Extractor, reference: Reference, evaluate: EvaluateParams
    ) -> None:
        self.samples, self.card, self.reference, self.evaluate = samples, extractor.card, reference, evaluate
        self.seeds = samples.params.seeds
        self.distance: ReferenceDistance = reference.distance()
        self.manifold = Manifold(reference.features, evaluate.neighbours)
        self.kid_size = min(
            evaluate.kid_subset_size,
            len(samples.labels) - 1,
            len(reference.features) - 1,
            len(reference.held_out) - 1,
        )

    def score(self, unguided: list[Features], guided: list[Features], raw: Features | None) -> Scored:
        samples = self.samples
        without, closest = self._set(unguided, 1.0, samples.labels)
        guided_score = without
        if not samples.guided_is_unguided:
            guided_score, _ = self._set(guided, samples.params.guidance_scale, samples.guided_labels)
        protocol = self._protocol()
        record = ScoreRecord(
            weights_digest=samples.weights_digest,
            finite=samples.finite,
            unguided=without,
            guided=guided_score,
            floor=self._floor(),
            scale=self.reference.statistics.scale,
            raw_fid=None if raw is None else self.distance.fid(raw.values),
            protocol=protocol,
            protocol_digest=protocol.digest,
        )
        return Scored(record, closest)

    def _set(self, sets: list[Features], guidance_scale: float, labels: Tensor) -> tuple[SetScore, list[ClosestPair]]:
        classes, evaluate = self.card.classes, self.evaluate
        together, all_labels = joined(sets), labels.repeat(len(sets))
        kids = [
            self.distance.kid(found.values, evaluate.kid_subsets, self.kid_size, seed)
            for found, seed in zip(sets, self.seeds, strict=False)  # the guided set has the first seed alone
        ]
        manifold = [precision_recall(self.manifold, found.values) for found in sets]
        copies, closest = measure_memorisation(
            together.values, self.reference.features, self.reference.held_out, NUM_PAIRS
        )
        found = SetScore(
            guidance_scale=guidance_scale,
            fid=over_seeds([self.distance.fid(found.values) for found in sets]),
            fid_deviation=fid_deviation(self.reference.moments, [found.values for found in sets], labels),
            fid_infinity=fid_infinity(self.reference.moments, together.values, all_labels, self.seeds[0]),
            kid=over_seeds([kid.mean for kid in kids]),
            kid_std=sum(kid.std for kid in kids) / len(kids),
            precision=over_seeds([precision for precision, _ in manifold]),
            recall=over_seeds([recall for _, recall in manifold]),
            memorisation=copies,
            class_accuracy=over_seeds([found.accuracy(labels) for found in sets]) if classes else None,
            class_accuracies=together.class_accuracies(all_labels, len(classes)) if classes else None,
        )
        return found, closest

    def _floor(self) -> RealScore:
        statistics, held_out = self.reference.statistics, self.reference.held_out
        kid = self.distance.kid(held_out, self.evaluate.kid_subsets, self.kid_size, self.seeds[0])
        precision, recall = precision_recall(self.manifold, held_out)
        return RealScore(
            num_images=statistics.floor_num_images,
            fid=statistics.floor_fid,
            kid=kid.mean,
            kid_std=kid.std,
            precision=precision,
            recall=recall,
            class_accuracy=statistics.floor_class_accuracy,
            class_accuracies=statistics.floor_class_accuracies,
        )

    def _protocol(self) -> Protocol:
        params, statistics, evaluate = self.samples.params, self.reference.statistics, self.evaluate
        return Protocol(
            code=code_digest(),
            extractor=self.card.kind,
            extractor_weights=self.card.weights_digest,
            classifier=self.card.classifier_digest,
            data=statistics.data_digest,
            reference=statistics.features_digest,
            reference_images=statistics.num_images,
            published_statistics=statistics.published_statistics,
            num_images=len(self.samples.labels),
            seeds=params.seeds,
            **{name: getattr(params, name) for name in DrawParams.model_fields},
            resize=self.card.resize,
            kid_subsets=evaluate.kid_subsets,
            kid_subset_size=evaluate.kid_subset_size,
            neighbours=evaluate.neighbours,
        )
