"""A score and everything that shaped it. Scores are comparable exactly when their protocols have the same digest."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from darkroom.errors import InputError
from darkroom.evaluation.reference import Scale
from darkroom.files import digest_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Protocol(_Record):
    """Under what a score was measured. Every field is part of the digest."""

    code: str  # digest of what draws and measures
    extractor: str  # sha256 of the classifier's weights
    reference: str  # sha256 of the real images' features
    num_images: int
    sampler: str
    steps: int
    spacing: str
    eta: float
    clipping: str
    guidance_scale: float  # of the guided set; the unguided one has 1
    guidance_interval: list[float] | None
    precision: str
    seed: int
    sample_dtype: Literal["uint8"] = "uint8"
    resize: Literal["none"] = "none"  # features are taken at the images' own size
    kid_subsets: int
    kid_subset_size: int

    @property
    def digest(self) -> str:
        """sha256 over all fields, 64 hexadecimal digits."""
        return digest_json(self.model_dump())

    def differences(self, other: "Protocol") -> list[str]:
        """A line for each field in which two protocols differ."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]


class SetScore(_Record):
    """Scores of one set of samples."""

    guidance_scale: float
    fid: float
    kid: float
    kid_std: float
    class_accuracy: float | None = None  # share that the reference classifier gives the label they were drawn for


class RealScore(_Record):
    """What real images that were held out get: the floor."""

    num_images: int
    fid: float
    kid: float
    kid_std: float
    class_accuracy: float | None = None


class ScoreRecord(_Record):
    """`reports/metrics.json`. Of images without classes there is no class accuracy: the key is absent."""

    weights_digest: str
    finite: bool  # all weights
    unguided: SetScore
    guided: SetScore
    floor: RealScore
    scale: Scale
    protocol: Protocol
    protocol_digest: str

    @model_validator(mode="after")
    def _all_class_accuracies_or_none(self) -> Self:
        if len({score.class_accuracy is None for score in (self.unguided, self.guided, self.floor)}) > 1:
            raise ValueError("class_accuracy is missing in some of unguided, guided and floor")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError if the file is missing, garbled or its protocol digest is not that of its protocol."""
        try:
            record = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; `dvc repro` makes it") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the record"
            raise InputError(f"{path}: {where}: {first['msg']}") from None
        if record.protocol.digest != record.protocol_digest:
            raise InputError(f"{path}: protocol_digest is not the digest of protocol; the file was edited")
        return record

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        absent: set[str] = {"class_accuracy"} if self.floor.class_accuracy is None else set()
        return self.model_dump(mode="json", exclude=dict.fromkeys(("unguided", "guided", "floor"), absent))
