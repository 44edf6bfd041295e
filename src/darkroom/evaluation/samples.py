"""The evaluation images of a model, drawn without and with guidance, stored with what they came from."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.files import read_json, write_bytes, write_json
from darkroom.params import SampleParams


@dataclass(frozen=True)
class SampleSet:
    """Images for the same labels by the same seed, without (s = 1) and with guidance."""

    unguided: Tensor  # uint8 (N, C, H, W)
    guided: Tensor
    labels: Tensor  # int64 (N,), balanced
    params: SampleParams
    weights_digest: str  # of the model
    finite: bool  # all of its weights

    def write(self, directory: Path) -> None:
        """Write the arrays as .npy and, last, `samples.json`."""
        for name in ("unguided", "guided", "labels"):
            buffer = io.BytesIO()
            np.save(buffer, getattr(self, name).numpy(), allow_pickle=False)
            write_bytes(directory / f"{name}.npy", buffer.getvalue())
        record = {"params": self.params.model_dump(), "weights_digest": self.weights_digest, "finite": self.finite}
        write_json(directory / "samples.json", record)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """What `write` wrote. Raises InputError if it is not there or not whole."""
        try:
            record = read_json(directory / "samples.json")
            arrays = {
                name: torch.from_numpy(np.load(directory / f"{name}.npy", allow_pickle=False))
                for name in ("unguided", "guided", "labels")
            }
            params = SampleParams.model_validate(record["params"])
            return cls(**arrays, params=params, weights_digest=record["weights_digest"], finite=record["finite"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{directory}: {error}; `dvc repro sample` makes it") from None


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
