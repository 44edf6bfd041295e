"""A trained model: loading its EMA weights and drawing from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from darkroom.diffusion.card import CARD_FILE, WEIGHTS_FILE, ModelCard
from darkroom.diffusion.guidance import Network, guided
from darkroom.diffusion.objective import Prediction, to_eps
from darkroom.diffusion.pixels import to_uint8
from darkroom.diffusion.samplers import SAMPLERS, THRESHOLDS, Sampling
from darkroom.diffusion.schedules import make_schedule
from darkroom.diffusion.timesteps import spaced_timesteps
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.nets.inference import InferenceUNet
from darkroom.nets.unet import UNet
from darkroom.params import DrawParams
from darkroom.randomness import Purpose, normal

DRAW_FILE = "draw.json"  # in a registered model: how it was drawn from when it was measured


def read_draw_params(directory: Path) -> DrawParams | None:
    """The settings that a registered model was measured with; None if it does not name them. Raises InputError."""
    path = directory / DRAW_FILE
    try:
        return DrawParams.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


class DiffusionModel:
    """A network with EMA weights and its schedule, in evaluation mode."""

    def __init__(self, card: ModelCard, network: UNet, *, compiled: bool = False) -> None:
        self.card = card
        self.network = network.eval().requires_grad_(False)
        self.schedule = make_schedule(card.schedule.name, card.schedule.num_timesteps)
        self._compiled = compiled
        self._prepared: dict[str, InferenceUNet] = {}  # by precision

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu", *, compiled: bool = False) -> Self:
        """Read `model.json` and `ema.safetensors`. Raises InputError if one is missing, damaged or not the other's.

        `compiled` has torch.compile make the network faster, after a minute or more of compiling.
        """
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
        return cls(card, network.to(device), compiled=compiled)

    def check_request(self, labels: Tensor, settings: DrawParams, guidance_scale: Tensor | None = None) -> None:
        """Raise InputError, naming the value and what is allowed, for anything that `draw` cannot do."""
        classes, total = self.card.classes, self.schedule.num_timesteps
        bad = labels[(labels < 0) | (labels >= self.card.num_labels)]
        if len(bad):
            known = f"0 to {len(classes) - 1} ({', '.join(classes[:20])})" if classes else "0, it has no classes"
            raise InputError(f"class label {int(bad[0])}: expected {known}")
        if settings.steps > total:
            raise InputError(f"steps = {settings.steps}: expected 1 to {total}, the timesteps of this model's schedule")
        for scale in [settings.guidance_scale] if guidance_scale is None else torch.unique(guidance_scale).tolist():
            if not 0 <= scale <= 100:
                raise InputError(f"guidance_scale = {scale}: expected 0 to 100")
            if scale != 1 and self.card.null_class is None:
                raise InputError(f"guidance_scale = {scale}: this model was trained without label dropping; only 1")

    @torch.inference_mode()
    def draw(
        self,
        labels: Tensor,
        settings: DrawParams,
        *,
        seed: int | Tensor,
        index: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        batch_size: int = 256,
        progress: Callable[[int], None] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw one image per label: uint8 (N, C, H, W) on the CPU, for `labels` int64 (N,), all 0 without classes.

        Image i's randomness is a function of (seed, index[i]) alone; `index` (N,) defaults to 0 … N-1. A tensor `seed`
        int64 (N,) on the CPU is a seed for each image; `index` then defaults to 0, so that image i is the one that its
        seed draws alone. On one device image i is the same to the last bit in any batch. `guidance_scale` (N,) is one
        scale per image in the place of the settings' single one. `progress` gets the number of finished images after
        each batch; `on_step` the number of finished steps of a batch and its estimate of x_0, float32 (n, C, H, W) on
        the device.

        Raises InputError for what `check_request` refuses and FloatingPointError, naming the timestep, if the network
        returns values that are not finite.
        """
        self.check_request(labels, settings, guidance_scale)
        if index is None:
            index = torch.zeros_like(labels) if isinstance(seed, Tensor) else torch.arange(len(labels))
        if guidance_scale is None:
            guidance_scale = torch.full((len(labels),), settings.guidance_scale, dtype=torch.float64)
        device = next(self.network.parameters()).device
        timesteps = spaced_timesteps(self.schedule, settings.steps, settings.spacing)
        predict = self._predictor(timesteps, labels, settings.precision)
        interval = settings.guidance_interval
        shape = (self.card.channels, self.card.image_size, self.card.image_size)
        batches = []
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            seeds, here = seed[part] if isinstance(seed, Tensor) else seed, index[part].to(device)
            denoise = guided(
                predict,
                labels[part].to(device),
                guidance_scale[part],
                self.card.null_class,
                sigma=self.schedule.sigma,
                interval=None if interval is None else (interval[0], interval[1]),
            )

            def step_noise(step: int, x: Tensor, seeds: int | Tensor = seeds, here: Tensor = here) -> Tensor:
                return _normal(seeds, Purpose.STEP_NOISE, here, shape, step)

            sampling = Sampling(
                step_noise=step_noise, threshold=THRESHOLDS[settings.clipping], eta=settings.eta, on_step=on_step
            )
            noise = _normal(seeds, Purpose.INITIAL_NOISE, here, shape)
            x_0 = SAMPLERS[settings.sampler](denoise, noise, self.schedule, timesteps, sampling)
            predict.check()
            batches.append(to_uint8(x_0).cpu())
            if progress:
                progress(min(start + batch_size, len(labels)))
        return torch.cat(batches) if batches else torch.empty((0, *shape), dtype=torch.uint8)

    def _predictor(self, timesteps: Sequence[int], labels: Tensor, precision: Literal["fp32", "bf16"]) -> "_Predictor":
        """The network for these timesteps and labels, predicting eps."""
        if precision not in self._prepared:
            self._prepared[precision] = InferenceUNet(self.network, precision, compile=self._compiled)
        asked = torch.unique(labels)
        if self.card.null_class is not None:
            asked = torch.cat((asked, torch.tensor([self.card.null_class])))
        device = next(self.network.parameters()).device
        return _Predictor(
            network=self._prepared[precision].plan(timesteps, asked.to(device)),
            prediction=self.card.prediction,
            alpha_bar=self.schedule.alpha_bar.tolist(),
        )


def _normal(seeds: int | Tensor, purpose: Purpose, index: Tensor, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """`normal` for one seed or an int64 (N,) on the CPU of one for each of `index` (N,)."""
    if isinstance(seeds, int):
        return normal(seeds, purpose, index, shape, step)
    noise = torch.empty((len(index), *shape), device=index.device)
    for seed in torch.unique(seeds).tolist():
        mine = (seeds == seed).nonzero().flatten().to(index.device)
        noise[mine] = normal(seed, purpose, index[mine], shape, step)
    return noise


@dataclass
class _Predictor:
    """Calls a network and keeps, without waiting for the device, what tells whether its outputs were finite."""

    network: Network
    prediction: Prediction
    alpha_bar: list[float]
    sums: list[tuple[int, Tensor]] = field(default_factory=list)  # timestep and sum of each output since the last check

    def __call__(self, x_t: Tensor, t: int, labels: Tensor) -> Tensor:
        """eps of x_t's shape."""
        output = self.network(x_t, t, labels)
        self.sums.append((t, output.sum()))  # not finite if any of its values is not
        return to_eps(self.prediction, output, x_t, self.alpha_bar[t])

    def check(self) -> None:
        """Raise FloatingPointError, naming the timestep, if an output was not finite. Waits for the device."""
        timesteps, sums = zip(*self.sums, strict=True)
        self.sums.clear()
        for t, finite in zip(timesteps, torch.stack(sums).isfinite().tolist(), strict=True):
            if not finite:
                raise FloatingPointError(f"the network returned values that are not finite at timestep {t}")
