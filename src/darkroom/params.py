"""`params.yaml` as frozen typed models, one per stage; what cannot work is refused here, before any work starts."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from darkroom.errors import InputError
from darkroom.params_errors import CHECKSUM, DIGEST, error_lines, keys_of, shortened, shown
from darkroom.yaml_text import parse_yaml

_MOST = 10**9  # of what nothing else bounds: a number with too many zeros is a slip
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Above0 = Annotated[float, Field(gt=0, le=_MOST)]
AtLeast0 = Annotated[float, Field(ge=0, le=_MOST)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Width = Annotated[int, Field(ge=1, le=65_536)]  # channels of a layer
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
Digest = Annotated[str, Field(pattern=DIGEST)]  # sha256, or how it begins
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_MAX_BYTES = 256 << 10  # of params.yaml
BUILT_IN = ("digits", "photos")  # values of data.source that need no files
NoiseLevel = AtLeast0  # sigma = sqrt((1 - alpha_bar) / alpha_bar)


class Group(BaseModel):
    """A group of parameters: immutable, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _refuse(key: str, value: object, allowed: str) -> PydanticCustomError:
    """An error about `key`, relative to the group whose validator raises it."""
    return PydanticCustomError("combination", "{allowed}", {"key": key, "value": value, "allowed": allowed})


class DataParams(Group):
    """prepare: which images, at which size, split how."""

    source: Text  # digits, photos, or a file, folder or s3:// URI of a form in docs/data.md
    checksum: Annotated[str, Field(pattern=CHECKSUM)] | None  # of a source that is one file
    image_size: Annotated[int, Field(ge=4, le=1024)]  # pixels, square
    channels: Literal[1, 3]
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)]  # 0: unlabelled
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None  # of each class, held out; None: the source's own split
    seed: Seed

    @model_validator(mode="after")
    def _built_in_sources_are_what_they_are(self) -> Self:
        if self.source == "digits" and self.num_classes != 10:
            raise _refuse("num_classes", self.num_classes, 'source "digits" has 10 labels: expected 10')
        if self.source == "digits" and self.channels != 1:
            raise _refuse("channels", self.channels, 'source "digits" is grey: expected 1')
        if self.source == "photos" and self.num_classes != 2:
            raise _refuse("num_classes", self.num_classes, 'source "photos" has 2 labels: expected 2')
        if self.source in BUILT_IN and self.checksum is not None:
            raise _refuse("checksum", self.checksum, f'source "{self.source}" is no file: expected null')
        return self


class ValidateParams(Group):
    """validate: thresholds of the expectation suite."""

    min_images_per_class: Positive
    max_constant_share: Fraction  # share of images of one single colour
    max_undecodable: Count
    max_in_both_splits: Count  # rows whose image is in train and in test
    modes: Annotated[list[Text], Field(min_length=1)] | None  # of the source images, by Pillow's name; None: any
    near_duplicate_bits: Annotated[int, Field(ge=0, le=8)]  # of 64: perceptual hashes that differ in no more are close
    max_near_duplicate_share: Fraction
    max_imbalance: Annotated[float, Field(ge=1, le=_MOST)]  # a class's images over the average's, or the inverse
    max_class_drift: Fraction  # total variation distance of the class shares from the accepted data set's
    max_channel_drift: Annotated[float, Field(ge=0, le=_MOST)]  # of means and deviations, in the accepted deviations


class ReferenceParams(Group):
    """reference: what images are measured with, and the classifier that judges their classes.

    Where the files are that the digests name is the environment's to say: DARKROOM_INCEPTION_WEIGHTS,
    DARKROOM_REFERENCE_STATISTICS.
    """

    extractor: Literal["classifier", "inception"]  # whose features serve FID, KID, precision and recall
    inception_sha256: Digest  # of the file with InceptionV3's weights: its first 8 digits or more
    published_statistics: Digest | None  # sha256 of an npz with mu and sigma, which replace the reference's in FID
    max_features: Annotated[int, Field(ge=100, le=_MOST)]  # of training images kept for KID, precision, recall, copies
    channels: Annotated[list[Width], Field(min_length=1, max_length=9)]
    features: Width
    steps: Positive
    batch_size: BatchSize
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    min_accuracy: Fraction  # on the held-out split; below it the stage fails
    seed: Seed

    @model_validator(mode="after")
    def _published_ones_are_of_inception(self) -> Self:
        if self.published_statistics is not None and self.extractor != "inception":
            allowed = "only extractor: inception has published ones: expected null"
            raise _refuse("published_statistics", self.published_statistics, allowed)
        return self


class UNetParams(Group):
    """The network (Ho 2020; Dhariwal & Nichol 2021): one entry of `channels` per resolution level."""

    channels: Annotated[list[Width], Field(min_length=1, max_length=9)]  # 1024 pixels halve eight times down to 4
    num_res_blocks: Annotated[int, Field(ge=1, le=100)]  # per level on the way down; one more on the way up
    attention_resolutions: Annotated[list[Positive], Field(max_length=9)]  # side lengths, in pixels
    head_channels: Width
    norm_groups: Width
    dropout: Annotated[float, Field(ge=0, lt=1)]
    time_conditioning: Literal["additive", "scale_shift"]

    @model_validator(mode="after")
    def _channels_divide(self) -> Self:
        for width in self.channels:
            if width % self.norm_groups:
                allowed = f"every entry a multiple of norm_groups = {self.norm_groups}; {width} is not"
                raise _refuse("channels", self.channels, f"expected {allowed}")
        return self

    def check_resolution(self, image_size: int) -> None:
        """Raise unless an image of this side length can pass and attention is asked for where it occurs."""
        down = 2 ** (len(self.channels) - 1)
        if image_size % down:
            raise _refuse(
                "channels",
                self.channels,
                f"{len(self.channels)} levels halve the image {len(self.channels) - 1} times: expected data.image_size"
                f" = {image_size} to be a multiple of {down}",
            )
        resolutions = [image_size // 2**level for level in range(len(self.channels))]
        for resolution in self.attention_resolutions:
            if resolution not in resolutions:
                raise _refuse(
                    "attention_resolutions",
                    self.attention_resolutions,
                    f"resolution {resolution} does not occur: expected some of {resolutions}",
                )
        pairs = zip(self.channels, resolutions, strict=True)
        attended = [width for width, resolution in pairs if resolution in self.attention_resolutions]
        for width in [*attended, self.channels[-1]]:  # the middle of the network attends too
            if width % self.head_channels:
                allowed = f"expected a divisor of {width}, the channels of a level that attends (the lowest one does)"
                raise _refuse("head_channels", self.head_channels, allowed)


class ScheduleParams(Group):
    """The forward process: linear (Ho 2020) at 32x32, cosine (Nichol & Dhariwal 2021) otherwise."""

    name: Literal["linear", "cosine"]
    num_timesteps: Annotated[int, Field(ge=2, le=10_000)]

    @model_validator(mode="after")
    def _noise_stays_below_one(self) -> Self:
        if self.name == "linear" and self.num_timesteps <= 20:
            allowed = "the linear schedule, scaled by 1000/T, reaches beta = 1 at T = 20: expected more than 20"
            raise _refuse("num_timesteps", self.num_timesteps, allowed)
        return self


class TrainParams(Group):
    """train: the UNet, its forward process, the optimizer and the EMA."""

    model: UNetParams
    schedule: ScheduleParams
    prediction: Literal["eps", "x_0", "v"]  # what the network predicts; eps is DDPM's
    loss_weighting: Literal["simple", "min_snr"]  # min_snr: Hang 2023, gamma = 5
    steps: Positive
    batch_size: BatchSize
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    lr_warmup_steps: Count
    lr_decay: Literal["constant", "cosine"]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    gradient_clip: Above0
    label_dropout: Annotated[float, Field(ge=0, lt=1)]
    horizontal_flip: bool
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    ema_snapshots: Annotated[int, Field(ge=0, le=1000)]  # of power-function averages, for `darkroom ema`
    precision: Literal["fp32", "tf32", "bf16"]  # of the network; weights, loss, optimizer and EMA stay in fp32
    seed: Seed

    def warnings(self) -> list[str]:
        """A line for each value that has no effect."""
        reached = (1 + self.steps) / (10 + self.steps)  # `training.ema.decay_at`
        if self.ema_decay <= reached:
            return []
        return [
            f"train.ema_decay = {self.ema_decay}: is never used: its warm-up, (1 + step) / (10 + step), ends at "
            f"{reached:.4f} after {self.steps} steps; every value above that trains the same average"
        ]


class DrawParams(Group):
    """How an image is drawn, always from EMA: with weights, label, seed and index it decides the image."""

    sampler: Literal["ddpm", "ddpm_beta", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "heun"]
    steps: Positive
    spacing: Literal["trailing", "leading", "linspace", "log_snr"]  # of the timesteps
    eta: Fraction  # of ddim: 0 deterministic, 1 as noisy as ddpm
    clipping: Literal["none", "static", "dynamic"]  # of the estimate of x_0
    guidance_scale: Annotated[float, Field(ge=0, le=100)]  # eps = eps_u + s (eps_c - eps_u); 1 is conditional
    guidance_interval: Annotated[list[NoiseLevel], Field(min_length=2, max_length=2)] | None  # low < sigma <= high
    precision: Literal["fp32", "bf16"]  # of the network; the sampler's state is fp32

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.eta > 0 and self.sampler != "ddim":
            raise _refuse("eta", self.eta, f"only sampler ddim has it: expected 0.0 with {self.sampler}")
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise _refuse("guidance_interval", self.guidance_interval, "expected [low, high] with low < high")
        return self

    def with_sampler(self, sampler: str) -> "DrawParams":
        """These settings with another sampler; eta stays with the one it was chosen for. Raises like `changed`."""
        return self.changed(sampler=sampler, eta=self.eta if sampler == self.sampler else 0.0)

    def changed(self, **values: object) -> "DrawParams":
        """These settings with some replaced. Raises InputError with a line per mistake: key, value, what is allowed."""
        known = {name: getattr(self, name) for name in DrawParams.model_fields}
        try:
            return DrawParams.model_validate(known | values)
        except ValidationError as error:
            raise InputError("\n".join(error_lines(error.errors(), DrawParams))) from None


class SampleParams(DrawParams):
    """sample: the evaluation images."""

    ema: Literal["trained", "auto"]  # auto: the average of the snapshots, or the training's, that has the lowest FID
    num_images: Positive  # for each seed
    batch_size: BatchSize
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=100)]  # a set each; scores spread over them

    @model_validator(mode="after")
    def _no_seed_twice(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise _refuse("seeds", self.seeds, "expected different seeds: equal ones give equal samples and no spread")
        return self


class EvaluateParams(Group):
    """evaluate: what the metrics need to know."""

    kid_subsets: Annotated[int, Field(ge=1, le=100_000)]
    kid_subset_size: Annotated[Positive, Field(ge=2)]
    neighbours: Positive  # of precision and recall


class GatePolicy(Group):
    """The ceilings and the margin that a challenger must meet; what concerns classes is asked where there are some."""

    max_fid: Above0  # of unguided samples
    min_class_accuracy: Fraction  # of unguided samples
    min_guided_class_accuracy: Fraction  # at sample.guidance_scale
    min_worst_class_accuracy: Fraction  # of each class, at sample.guidance_scale
    max_near_copies: Fraction  # share of samples nearer to a training image than the nearest 1 % of held-out images
    margin: Annotated[float, Field(ge=0, le=_MOST)]  # standard errors a challenger may be worse by than the champion
    retraining_scatter: Fraction  # deviation of FID over trainings that differ in their seed, as a share of FID
    max_seconds_per_image: Above0  # one image alone, where the model is promoted


class RegistryParams(Group):
    """register and promote, which run outside DVC."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)
    gate: GatePolicy


class Params(Group):
    """All of `params.yaml`."""

    data: DataParams
    validate_: ValidateParams = Field(alias="validate")
    reference: ReferenceParams
    train: TrainParams
    sample: SampleParams
    evaluate: EvaluateParams
    registry: RegistryParams

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Self:
        try:
            self.train.model.check_resolution(self.data.image_size)
        except PydanticCustomError as error:
            context = error.context or {}
            raise _refuse(f"train.model.{context['key']}", context["value"], context["allowed"]) from None
        if self.data.num_classes == 0 and self.train.label_dropout != 0:
            allowed = "data.num_classes = 0, so there are no labels to drop: expected 0.0"
            raise _refuse("train.label_dropout", self.train.label_dropout, allowed)
        if self.data.num_classes == 0 and self.sample.guidance_scale != 1:
            allowed = "data.num_classes = 0, so there is nothing to guide towards: expected 1.0"
            raise _refuse("sample.guidance_scale", self.sample.guidance_scale, allowed)
        if self.sample.guidance_scale != 1 and self.train.label_dropout == 0:
            allowed = (
                "guidance needs the null class that label dropping trains: expected 1.0, or train.label_dropout > 0"
            )
            raise _refuse("sample.guidance_scale", self.sample.guidance_scale, allowed)
        if self.sample.ema == "auto" and self.train.ema_snapshots == 0:
            allowed = "train.ema_snapshots = 0, so there is nothing to choose from: expected trained"
            raise _refuse("sample.ema", self.sample.ema, allowed)
        if self.sample.steps > self.train.schedule.num_timesteps:
            allowed = f"expected at most train.schedule.num_timesteps = {self.train.schedule.num_timesteps}"
            raise _refuse("sample.steps", self.sample.steps, allowed)
        if self.sample.num_images < self.data.num_classes:
            allowed = f"expected at least one image per class, data.num_classes = {self.data.num_classes}"
            raise _refuse("sample.num_images", self.sample.num_images, allowed)
        least = max(10, self.evaluate.neighbours + 1)
        if self.sample.num_images < least:
            allowed = f"expected at least {least}, which FID's extrapolation and evaluate.neighbours take"
            raise _refuse("sample.num_images", self.sample.num_images, allowed)
        if self.evaluate.kid_subset_size >= self.sample.num_images:
            allowed = f"expected less than sample.num_images = {self.sample.num_images}"
            raise _refuse("evaluate.kid_subset_size", self.evaluate.kid_subset_size, allowed)
        return self


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`. Raises InputError with one line per mistake: file, key, value, what is allowed."""
    try:
        with path.open(encoding="utf-8") as file:
            content = parse_yaml(file.read(_MAX_BYTES + 1), _MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path.name}:{mark.line + 1}" if mark else path.name
        raise InputError(f"{where}: {shortened(str(error.problem))}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name}: expected the groups {', '.join(keys_of(Params))}, found {shown(content)}")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(f"{path.name}: {line}" for line in error_lines(error.errors(), Params))) from None
