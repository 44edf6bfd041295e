"""Drawing the evaluation images of a model."""

from collections.abc import Callable

import torch
from torch import Tensor

from darkroom.diffusion.model import DiffusionModel
from darkroom.evaluation.samples import SampleSet
from darkroom.params import SampleParams


def balanced_labels(num_images: int, num_classes: int) -> Tensor:
    """0, 1, … num_classes - 1, 0, 1, …: int64 (num_images,); class counts differ by one at most."""
    return torch.arange(num_images) % num_classes


def draw_samples(
    model: DiffusionModel, params: SampleParams, progress: Callable[[int], None] | None = None
) -> SampleSet:
    """Draw the evaluation images. `progress` counts finished images, up to 2 N."""
    labels = balanced_labels(params.num_images, len(model.card.classes))

    def draw(guidance_scale: float, done_before: int) -> Tensor:
        return model.draw(
            labels,
            seed=params.seed,
            sampler=params.sampler,
            steps=params.steps,
            guidance_scale=guidance_scale,
            precision=params.precision,
            batch_size=params.batch_size,
            progress=(lambda done: progress(done_before + done)) if progress else None,
        )

    unguided = draw(1.0, 0)
    guided = unguided if params.guidance_scale == 1 else draw(params.guidance_scale, params.num_images)
    return SampleSet(unguided, guided, labels, params, model.card.weights_digest, is_finite(model))


def is_finite(model: DiffusionModel) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(tensor.isfinite().all()) for tensor in model.network.state_dict().values())
