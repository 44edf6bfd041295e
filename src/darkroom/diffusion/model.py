"""A trained model on disk and in memory: EMA weights, what rebuilds the network, and how to draw from it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from darkroom.diffusion.guidance import guided
from darkroom.diffusion.samplers import SAMPLERS, spaced_timesteps
from darkroom.diffusion.schedules import make_schedule
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.nets.unet import UNet
from darkroom.params import ScheduleParams, UNetParams
from darkroom.randomness import Purpose, normal

WEIGHTS_FILE = "ema.safetensors"
CARD_FILE = "model.json"


class ModelCard(BaseModel):
    """`model.json`: with the weights beside it, all that a model is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    image_size: int
    channels: int
    classes: list[str]  # names; the index is the label
    unet: UNetParams
    schedule: ScheduleParams
    label_dropout: float
    fingerprint: str  # of the training
    data_digest: str
    weights_digest: str  # sha256 of ema.safetensors

    @property
    def null_class(self) -> int | None:
        """The label that stands for none; there is one exactly when labels were dropped in training."""
        return len(self.classes) if self.label_dropout > 0 else None

    def build(self) -> UNet:
        """The network, with fresh weights."""
        return build_unet(self.unet, self.image_size, self.channels, len(self.classes), self.label_dropout)


def build_unet(unet: UNetParams, image_size: int, channels: int, num_classes: int, label_dropout: float) -> UNet:
    """The UNet that `train.model` in params.yaml describes, for images and labels of the prepared data."""
    return UNet(
        image_size=image_size,
        image_channels=channels,
        num_classes=num_classes,
        null_class=label_dropout > 0,
        **unet.model_dump(),
    )


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 by rounding: the exact inverse of `to_unit_range` on all 256 levels."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class DiffusionModel:
    """A network with EMA weights and its schedule, in evaluation mode."""

    def __init__(self, card: ModelCard, network: UNet) -> None:
        self.card = card
        self.network = network.eval().requires_grad_(False)
        self.schedule = make_schedule(card.schedule.name, card.schedule.num_timesteps)

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu") -> Self:
        """Read `model.json` and `ema.safetensors`. Raises InputError if one is missing, damaged or not the other's."""
        card_path, weights_path = directory / CARD_FILE, directory / WEIGHTS_FILE
        for path in (card_path, weights_path):
            if not path.is_file():
                raise InputError(f"{path}: no such file; `dvc repro` makes it")
        try:
            card = ModelCard.model_validate_json(card_path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{card_path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        found = digest_file(weights_path)
        if found != card.weights_digest:
            raise InputError(f"{weights_path}: sha256 is {found[:12]}…, {CARD_FILE} says {card.weights_digest[:12]}…")
        network = card.build()
        try:
            network.load_state_dict(load_file(weights_path))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{weights_path}: does not hold this network: {error}") from None
        return cls(card, network.to(device))

    def check_request(self, labels: Tensor, sampler: str, steps: int, guidance_scale: float) -> None:
        """Raise InputError, naming the value and what is allowed, for anything that `draw` cannot do."""
        classes, total = self.card.classes, self.schedule.num_timesteps
        bad = labels[(labels < 0) | (labels >= len(classes))]
        if len(bad):
            raise InputError(f"class label {int(bad[0])}: expected 0 to {len(classes) - 1} ({', '.join(classes[:20])})")
        if sampler not in SAMPLERS:
            raise InputError(f"sampler = {sampler!r}: expected {' or '.join(SAMPLERS)}")
        if not 1 <= steps <= total:
            raise InputError(f"steps = {steps}: expected 1 to {total}")
        if not 0 <= guidance_scale <= 100:
            raise InputError(f"guidance_scale = {guidance_scale}: expected 0 to 100")
        if guidance_scale != 1 and self.card.null_class is None:
            raise InputError(
                f"guidance_scale = {guidance_scale}: this model was trained without label dropping; only 1"
            )

    @torch.inference_mode()
    def draw(
        self,
        labels: Tensor,
        *,
        seed: int,
        sampler: str,
        steps: int,
        guidance_scale: float,
        index: Tensor | None = None,
        precision: str = "fp32",
        batch_size: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw one image per label: uint8 (N, C, H, W) on the CPU, for `labels` int64 (N,).

        Image i's randomness is a function of (seed, index[i]) alone; `index` (N,) defaults to 0 … N-1. `progress` gets
        the number of finished images after each batch. Raises InputError for what `check_request` refuses and
        FloatingPointError if the network returns values that are not finite.
        """
        self.check_request(labels, sampler, steps, guidance_scale)
        index = torch.arange(len(labels)) if index is None else index
        device = next(self.network.parameters()).device
        timesteps = spaced_timesteps(self.schedule, steps)
        shape = (self.card.channels, self.card.image_size, self.card.image_size)
        batches = []
        for start in range(0, len(labels), batch_size):
            here = index[start : start + batch_size].to(device)
            denoise = guided(
                self._predictor(precision, device),
                labels[start : start + batch_size].to(device),
                guidance_scale,
                self.card.null_class,
            )

            def step_noise(step: int, x: Tensor, here: Tensor = here) -> Tensor:
                return normal(seed, Purpose.STEP_NOISE, here, shape, step)

            noise = normal(seed, Purpose.INITIAL_NOISE, here, shape)
            x_0 = SAMPLERS[sampler](denoise, noise, self.schedule, timesteps, step_noise)
            if not bool(x_0.isfinite().all()):
                raise FloatingPointError("the network returned values that are not finite")
            batches.append(to_uint8(x_0).cpu())
            if progress:
                progress(min(start + batch_size, len(labels)))
        return torch.cat(batches) if batches else torch.empty((0, *shape), dtype=torch.uint8)

    def _predictor(self, precision: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The network alone under autocast; the sampler's state stays in float32."""

        def predict(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if precision == "bf16":
                context = torch.autocast(device.type, dtype=torch.bfloat16)
            with context:
                eps: Tensor = self.network(x_t, t, labels)
            return eps.float()

        return predict
