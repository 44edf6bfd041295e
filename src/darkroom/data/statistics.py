"""What a data set looks like in a few numbers, exactly: images per class and moments per channel."""

from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from darkroom.errors import InputError
from darkroom.files import read_json, write_json

STATISTICS_FILE = "statistics.json"
_HIGHEST = 255  # value of a pixel

Count = Annotated[int, Field(ge=0)]


class DataStatistics(BaseModel):
    """`statistics.json`: the decoded images of both splits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str  # of the data set, as in dataset.json
    image_size: int  # pixels, square
    channels: int  # 1 grey, 3 RGB
    classes: dict[str, Count]  # images per class; empty: unlabelled
    images: Count
    sums: list[Count]  # of the packed pixels of all images, per channel
    squares: list[Count]  # the same of their squares

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if {len(self.sums), len(self.squares)} != {self.channels}:
            raise ValueError(f"expected sums and squares of {self.channels} channels")
        count = self.images * self.image_size**2
        for total, squares in zip(self.sums, self.squares, strict=True):
            if not (total <= squares <= _HIGHEST * total and total * total <= squares * count):
                raise ValueError("sums and squares of a channel are not those of pixels from 0 to 255")
        if self.classes and sum(self.classes.values()) != self.images:
            raise ValueError("the images of the classes are not all images")
        return self

    def class_shares(self) -> dict[str, float]:
        """Each class's share of the images, 0..1; empty for unlabelled data."""
        return {name: count / max(self.images, 1) for name, count in self.classes.items()}

    def channel_moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of every channel's pixels: two float64 (C,), 0..255; zeros without images."""
        count = max(self.images * self.image_size**2, 1)
        pairs = list(zip(self.sums, self.squares, strict=True))
        # In whole numbers up to the last step: 1.3 million images overflow 64 bits.
        deviations = [((count * squares - total * total) / count**2) ** 0.5 for total, squares in pairs]
        return np.array(self.sums) / count, np.array(deviations)


def write_statistics(path: Path, statistics: DataStatistics) -> None:
    """Write `statistics` as JSON, whole or not at all."""
    write_json(path, statistics.model_dump())


def read_statistics(prepared: Path) -> DataStatistics:
    """Read `statistics.json` of `prepared`. Raises InputError when it is missing or is not what prepare writes."""
    path = prepared / STATISTICS_FILE
    try:
        return DataStatistics.model_validate(read_json(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the prepare stage writes it") from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}; run the prepare stage again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run the prepare stage again") from None


def first_error(error: ValidationError) -> str:
    """Where and what the first mistake is, in a line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}"
