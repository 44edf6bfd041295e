"""A score and everything that shaped it. Scores are comparable exactly when their protocols have the same digest."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from darkroom.errors import InputError
from darkroom.files import digest_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Protocol(_Record):
    """Under what a score was measured. Every field is part of the digest."""

    code: str  # digest of what draws and measures
    extractor: Literal["classifier", "inception"]
    extractor_weights: str  # sha256
    classifier: str  # sha256 of the weights of what judges classes
    data: str  # digest of the prepared data that the reference comes from
    split: Literal["train"] = "train"
    reference: str  # sha256 of the real images' features
    reference_images: int
    published_statistics: str | None  # sha256 of a file with mean and covariance that replace the reference's for FID
    num_images: int  # of each seed
    seeds: list[int]
    sampler: str
    steps: int
    spacing: str
    eta: float
    clipping: str
    guidance_scale: float  # of the guided set; the unguided one has 1
    guidance_interval: list[float] | None
    precision: str
    sample_dtype: Literal["uint8"] = "uint8"
    resize: str  # "none": features are taken at the images' own size
    kid_subsets: int
    kid_subset_size: int
    neighbours: int  # of precision and recall

    @property
    def digest(self) -> str:
        """sha256 over all fields, 64 hexadecimal digits."""
        return digest_json(self.model_dump())

    def differences(self, other: "Protocol") -> list[str]:
        """A line for each field in which two protocols differ."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]


class Estimate(_Record):
    """A figure measured on one set of samples for each seed; on one set alone it has no spread."""

    value: float  # the mean over seeds
    spread: float | None  # standard deviation over seeds (n - 1); None for one seed
    low: float | None  # 95 % interval of the mean (Student's t); None for one seed
    high: float | None
    seeds: list[float]  # a value for each set, in the order of the protocol's seeds


class Memorisation(_Record):
    """Distances in feature space from samples to their nearest training image, against those of held-out images."""

    near_copies: float  # share of samples nearer to a training image than `threshold`
    threshold: float  # below it are the nearest 1 % of held-out images
    median_ratio: float  # median nearest distance of the samples over that of held-out images
    num_neighbours: int  # training images that were searched


class Scale(_Record):
    """FID of things whose quality anybody can imagine, so that a number means something."""

    noise_0_1: float  # the reference images with Gaussian noise of this standard deviation, at a range of [-1, 1]
    noise_0_2: float
    noise_0_4: float
    class_means: float  # every image replaced by the mean of its class; without classes, of all images
    pure_noise: float  # uniform over all levels


class SetScore(_Record):
    """Scores of the samples that were drawn at one guidance scale: unguided for each seed, guided for the first one."""

    guidance_scale: float
    fid: Estimate
    fid_deviation: float  # standard deviation of one set's FID, from the images of all: `uncertainty.fid_deviation`
    fid_infinity: float  # extrapolated to infinitely many images, from those of all seeds
    kid: Estimate
    kid_std: float  # over random subsets, the mean over seeds
    precision: Estimate
    recall: Estimate
    memorisation: Memorisation
    class_accuracy: Estimate | None = None  # share that the classifier gives the label they were drawn for
    class_accuracies: list[float] | None = None  # of each class, over the samples of all seeds


class RealScore(_Record):
    """What real images that were held out get: the floor."""

    num_images: int
    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    class_accuracy: float | None = None
    class_accuracies: list[float] | None = None


class ScoreRecord(_Record):
    """`reports/metrics.json`. Of images without classes there is no class accuracy: the key is absent."""

    weights_digest: str
    finite: bool  # all weights
    unguided: SetScore
    guided: SetScore
    floor: RealScore
    scale: Scale
    raw_fid: float | None  # of the weights without EMA, unguided, first seed; None if only EMA weights were there
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
        absent = {"class_accuracy", "class_accuracies"} if self.floor.class_accuracy is None else set[str]()
        return self.model_dump(mode="json", exclude=dict.fromkeys(("unguided", "guided", "floor"), absent))
