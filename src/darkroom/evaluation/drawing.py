"""Drawing the evaluation images of a model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.labels import balanced_labels, stratified_labels
from darkroom.evaluation.samples import SampleSet
from darkroom.evaluation.sharing import Alone, Sharing
from darkroom.params import SampleParams

RAW_FILE = "raw.safetensors"  # beside the EMA weights: what they are an average of


def draw_samples(
    model: DiffusionModel,
    params: SampleParams,
    class_counts: Sequence[int],
    *,
    raw: DiffusionModel | None = None,
    sharing: Sharing | None = None,
    progress: Callable[[int], None] | None = None,
) -> SampleSet | None:
    """Draw the evaluation images: an unguided set for each seed, and for the first one a guided set and a `raw` one.

    Unguided sets have their labels in the shares of `class_counts`, those of the reference; the guided set, by which
    each class is judged, has as many of each. The raw set is unguided, from the weights without EMA. On several
    processes the images are the same as on one; the first process gets them, the others None. `progress` counts images,
    up to `num_draws`; those that are being drawn count by their steps. Raises InputError if the reference has other
    classes.
    """
    sharing = sharing or Alone()
    total = params.num_images
    share = sharing.share(total)
    index = torch.arange(total)[share]
    if len(class_counts) != model.card.num_labels:
        raise InputError(f"the model has {model.card.num_labels} classes, the reference {len(class_counts)}")
    labels, balanced = stratified_labels(total, class_counts), balanced_labels(total, model.card.num_labels)
    finished = 0

    def draw(source: DiffusionModel, labels: Tensor, guidance_scale: float, seed: int) -> Tensor | None:
        nonlocal finished
        before, finished = finished, finished + total
        complete = 0  # images of this draw

        def show(images: int) -> None:
            if progress:
                progress(before + images * total // len(index))

        def on_batch(done: int) -> None:
            nonlocal complete
            complete = done
            show(done)

        def on_step(step: int, x_0: Tensor) -> None:
            """A batch may take minutes: its steps count as well."""
            show(complete + min(params.batch_size, len(index) - complete) * step // (params.steps + 1))

        images = source.draw(
            labels[share],
            params.changed(guidance_scale=guidance_scale),
            seed=seed,
            index=index,
            batch_size=params.batch_size,
            progress=on_batch,
            on_step=on_step,
        )
        return sharing.gather(images, total)

    first = params.seeds[0]
    unguided = [draw(model, labels, 1.0, seed) for seed in params.seeds]
    same = params.guidance_scale == 1 and torch.equal(labels, balanced)
    guided = unguided[0] if same else draw(model, balanced, params.guidance_scale, first)
    from_raw = None if raw is None else draw(raw, labels, 1.0, first)
    if guided is None:  # gathered on another process
        return None
    return SampleSet(
        torch.stack([images for images in unguided if images is not None]),
        guided,
        from_raw,
        labels,
        balanced,
        params,
        model.card.weights_digest,
        is_finite(model),
    )


def num_draws(params: SampleParams, class_counts: Sequence[int], *, raw: bool) -> int:
    """How many images `draw_samples` draws."""
    balanced = balanced_labels(params.num_images, len(class_counts))
    same = params.guidance_scale == 1 and torch.equal(stratified_labels(params.num_images, class_counts), balanced)
    return (len(params.seeds) + (not same) + raw) * params.num_images


def load_raw(directory: Path, model: DiffusionModel) -> DiffusionModel:
    """The same network with the weights that were not averaged. Raises InputError if they are missing or others'."""
    path = directory / RAW_FILE
    network = model.card.build()
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `dvc repro train` makes it") from None
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: does not hold this network: {error}") from None
    return DiffusionModel(model.card, network.to(next(model.network.parameters()).device))


def is_finite(model: DiffusionModel) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(tensor.isfinite().all()) for tensor in model.network.state_dict().values())
