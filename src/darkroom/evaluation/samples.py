"""The evaluation images of a model as they are stored: packed, with what they were drawn from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from darkroom.errors import InputError
from darkroom.files import read_json, replacing_directory, write_json
from darkroom.params import SampleParams


@dataclass(frozen=True)
class SampleSet:
    """Unguided images (s = 1) for each of S seeds, and guided ones from the first seed's noise."""

    unguided: Tensor  # uint8 (S, N, C, H, W)
    guided: Tensor  # uint8 (N, C, H, W)
    raw: Tensor | None  # uint8 (N, C, H, W): unguided, by the first seed, from the weights without EMA
    labels: Tensor  # int64 (N,), of the unguided images and the raw ones: in the shares of the reference
    guided_labels: Tensor  # int64 (N,), balanced
    params: SampleParams
    weights_digest: str  # of the model
    finite: bool  # all of its weights

    def write(self, directory: Path) -> None:
        """Put the arrays as .npy and `samples.json` in the place of `directory`, all or none."""
        record = {"params": self.params.model_dump(), "weights_digest": self.weights_digest, "finite": self.finite}
        with replacing_directory(directory) as new:
            for name in ("unguided", "guided", "raw", "labels", "guided_labels"):
                if (array := getattr(self, name)) is not None:
                    np.save(new / f"{name}.npy", array.numpy(), allow_pickle=False)
            write_json(new / "samples.json", record)

    @property
    def guided_is_unguided(self) -> bool:
        """Whether the guided images are those of the first unguided set."""
        return self.params.guidance_scale == 1 and torch.equal(self.labels, self.guided_labels)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """What `write` wrote. Raises InputError if it is not there or not whole."""
        try:
            record = read_json(directory / "samples.json")

            def array(name: str) -> Tensor:
                return torch.from_numpy(np.load(directory / f"{name}.npy", allow_pickle=False))

            return cls(
                unguided=array("unguided"),
                guided=array("guided"),
                raw=array("raw") if (directory / "raw.npy").is_file() else None,
                labels=array("labels"),
                guided_labels=array("guided_labels"),
                params=SampleParams.model_validate(record["params"]),
                weights_digest=record["weights_digest"],
                finite=record["finite"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{directory}: {error}; `dvc repro sample` makes it") from None
