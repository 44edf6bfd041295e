"""Drawing the evaluation images of a model."""

from collections.abc import Callable

import torch
from torch import Tensor

from darkroom.diffusion.model import DiffusionModel
from darkroom.evaluation.samples import SampleSet
from darkroom.params import SampleParams


def balanced_labels(num_images: int, num_labels: int) -> Tensor:
    """0, 1, … num_labels - 1, 0, 1, …: int64 (num_images,); counts differ by one at most."""
    return torch.arange(num_images) % num_labels


def draw_share(
    model: DiffusionModel, params: SampleParams, share: slice, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """The evaluation images number share.start … share.stop - 1, without and with guidance: uint8 (n, C, H, W) each.

    They are the same in any share. `progress` counts finished images, up to 2 n.
    """
    index = torch.arange(params.num_images)[share]
    labels = balanced_labels(params.num_images, model.card.num_labels)[share]

    def draw(guidance_scale: float, done_before: int) -> Tensor:
        return model.draw(
            labels,
            params.changed(guidance_scale=guidance_scale),
            seed=params.seed,
            index=index,
            batch_size=params.batch_size,
            progress=(lambda done: progress(done_before + done)) if progress else None,
        )

    unguided = draw(1.0, 0)
    return unguided, unguided if params.guidance_scale == 1 else draw(params.guidance_scale, len(index))


def sample_set(model: DiffusionModel, params: SampleParams, unguided: Tensor, guided: Tensor) -> SampleSet:
    """All evaluation images, uint8 (N, C, H, W) each, with what they were drawn from."""
    labels = balanced_labels(params.num_images, model.card.num_labels)
    return SampleSet(unguided, guided, labels, params, model.card.weights_digest, is_finite(model))


def draw_samples(
    model: DiffusionModel, params: SampleParams, progress: Callable[[int], None] | None = None
) -> SampleSet:
    """Draw the evaluation images in this process. `progress` counts finished images, up to 2 N."""
    return sample_set(model, params, *draw_share(model, params, slice(0, params.num_images), progress))


def is_finite(model: DiffusionModel) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(tensor.isfinite().all()) for tensor in model.network.state_dict().values())
