"""The libraries that train the models, each in a process of its own that is told when to go on.

A contender trains as its own training script does: its loss, its optimizer, its EMA, its gradient clipping at 1.0.
Images lie in memory, decoded; what a peer's data loader would cost is left out.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contenders import (
    MODELS,
    NUM_CLASSES,
    REHEARSAL,
    answering,
    card,
    describe,
    diffusers_unet,
    example,
    gaussian_diffusion,
    import_denoising_diffusion,
    rehearse_if_asked,
)

RECIPES = {"A64": "imagenet64", "A32": "cifar10", "digits": "digits"}
NUM_IMAGES = 512
PARAMS = Path(__file__).parents[1] / "params"


@dataclass(frozen=True)
class Size:
    """What is trained between two readings of the clock."""

    batch_size: int
    steps: int
    rounds: int


ON_CPU = {"A64": Size(4, 1, 5), "A32": Size(8, 1, 5), "digits": Size(64, 10, 15)}
ON_GPU = Size(128, 10, 5)
TOY = Size(4, 1, 2)


def size_of(model: str, device: str) -> Size:
    return ON_GPU if device == "cuda" else TOY if os.environ.get(REHEARSAL) else ON_CPU[model]


@dataclass(frozen=True)
class Trainer:
    """`train(turn)` calls `turn` before the first step and after every `Size.steps`; `turn` ends it by raising.

    What it hands to `turn` are the losses that it knows, means over these steps.
    """

    library: str
    network: Any  # torch.nn.Module
    forward: Callable[[], Any]  # of one image, for the count of its operations
    train: Callable[[Callable[..., None]], None]


def build(name: str, precision: str, device: str, steps: int, **changes: Any) -> tuple[Any, Any, Any]:
    """Network, batches and parameters of a recipe, for as many steps; on random images."""
    import torch

    from darkroom.data.dataset import DatasetInfo, Split
    from darkroom.device import choose_device
    from darkroom.params import load_params
    from darkroom.training.setup import set_up

    model, size = MODELS[name], size_of(name, device)
    os.environ["DARKROOM_DEVICE"] = device
    params = load_params(PARAMS / f"{RECIPES[name]}.yaml").train
    changes |= {"batch_size": size.batch_size, "precision": precision, "model": card(model).unet, "steps": steps}
    params = params.model_copy(update=changes)
    info = DatasetInfo(
        name=name,
        image_size=model.image_size,
        channels=model.image_channels,
        classes=[str(label) for label in range(NUM_CLASSES)],
        splits={"train": NUM_IMAGES},
        digest="",
    )
    shape = (NUM_IMAGES, model.image_channels, model.image_size, model.image_size)
    images, labels = torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(NUM_IMAGES) % NUM_CLASSES
    return *set_up(params, info, Split(images.numpy(), labels.numpy()), choose_device()), params


def ours(name: str, precision: str, device: str, compiled: bool = False, channels_last: bool = False) -> Trainer:
    """`darkroom.training.loop.train` of the recipe, its checkpoints left out: batches, metrics, EMA and all.

    The power-function averages are off: the peers have none.
    """
    from darkroom.training.kernels import Variant
    from darkroom.training.loop import Saving, train
    from darkroom.training.ticks import Tick

    steps = 100 * size_of(name, device).steps  # a hundred ticks
    network, batches, params = build(name, precision, device, steps, ema_snapshots=0)
    Variant(compiled, channels_last).apply(network)

    def run(turn: Callable[..., None]) -> None:
        def on_tick(tick: Tick) -> None:
            turn(tick.loss)

        turn()
        with tempfile.TemporaryDirectory() as directory, contextlib.closing(batches):
            saving = Saving(every_seconds=1e9)
            train(network, batches, params, Path(directory), "", on_tick=on_tick, on_resume=print, saving=saving)

    return Trainer("darkroom", network, lambda: network(*example(MODELS[name], device)), run)


def diffusers(name: str, precision: str, device: str, compiled: bool = False) -> Trainer:
    """UNet2DModel as diffusers' examples/unconditional_image_generation trains it, with labels; bf16 by autocast."""
    import torch
    import torch.nn.functional as F

    library: Any = importlib.import_module("diffusers")
    training_utils: Any = importlib.import_module("diffusers.training_utils")
    model, size = MODELS[name], size_of(name, device)
    unet = diffusers_unet(model).train().to(device)
    called = torch.compile(unet) if compiled else unet
    schedule = "squaredcos_cap_v2" if model.schedule == "cosine" else "linear"
    scheduler = library.DDPMScheduler(num_train_timesteps=1000, beta_schedule=schedule)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = training_utils.EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    images = _images(name, device) * 2 - 1

    def step() -> None:
        clean = images[torch.randint(NUM_IMAGES, (size.batch_size,), device=device)]
        labels = torch.randint(NUM_CLASSES, (size.batch_size,), device=device)
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(0, 1000, (size.batch_size,), device=device).long()
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = called(noisy, t, class_labels=labels).sample
        loss = F.mse_loss(output.float(), noise)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()  # it shows the loss of every step

    def forward() -> Any:
        x, t, labels = example(model, device)
        return unet(x, t, class_labels=labels).sample

    return Trainer(f"diffusers {library.__version__}", unet, forward, partial(repeat, step, size.steps))


def denoising_diffusion(name: str, precision: str, device: str) -> Trainer:
    """denoising-diffusion-pytorch's GaussianDiffusion as its Trainer trains it, unconditional; bf16 by autocast."""
    from importlib.metadata import version

    import torch

    package = import_denoising_diffusion()
    model, size = MODELS[name], size_of(name, device)
    diffusion = gaussian_diffusion(model).train().to(device)
    optimizer = package.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = package.EMA(diffusion, beta=0.995, update_every=10).to(device)
    images = _images(name, device)

    def step() -> None:
        clean = images[torch.randint(NUM_IMAGES, (size.batch_size,), device=device)]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion(clean)
            loss.item()  # it shows the loss of every step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    library, unet = "denoising-diffusion-pytorch", diffusion.model
    forward = lambda: unet(*example(model, device)[:2])  # noqa: E731
    return Trainer(f"{library} {version(library)}", unet, forward, partial(repeat, step, size.steps))


OWN = ("darkroom", "darkroom, channels last", "darkroom compiled", "darkroom compiled, channels last")
TRAINERS: dict[str, Callable[[str, str, str], Trainer]] = {
    "darkroom": ours,
    "darkroom, channels last": partial(ours, channels_last=True),
    "darkroom compiled": partial(ours, compiled=True),
    "darkroom compiled, channels last": partial(ours, compiled=True, channels_last=True),
    "diffusers": diffusers,
    "diffusers compiled": partial(diffusers, compiled=True),
    "denoising-diffusion-pytorch": denoising_diffusion,
}


def _images(name: str, device: str) -> Any:
    """Random images (N, C, H, W) in [0, 1]."""
    import torch

    model = MODELS[name]
    return torch.rand((NUM_IMAGES, model.image_channels, model.image_size, model.image_size), device=device)


def repeat(step: Callable[[], None], steps: int, turn: Callable[[], None]) -> None:
    """Turn after turn, until one raises."""
    while True:
        turn()
        for _ in range(steps):
            step()


class Done(Exception):
    """Nobody asks for more."""


class Turns:
    """Lets a training run on for each line of standard input, and answers how long it took and the memory it needed.

    On a GPU a waiting contender hands the memory that it does not use to the others. It gets it back in steps that are
    not measured.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], None], size: Size, device: str) -> None:
        self._answer, self._size, self._on_gpu = answer, size, device == "cuda"
        self._started: float | None = None
        self._measured = False
        self._losses: list[float] = []

    def __call__(self, *losses: float) -> None:
        import torch

        self._losses += losses
        if self._on_gpu:
            torch.cuda.synchronize()
        if self._started is not None and not self._measured:
            self._measured, self._started = True, time.perf_counter()
            return
        if self._started is not None:
            taken = {"seconds": time.perf_counter() - self._started, "memory": self._memory()}
            self._answer(taken | ({"losses": self._losses} if self._losses else {}))
            self._losses = []
            if self._on_gpu:
                torch.cuda.empty_cache()
        line = sys.stdin.readline()
        if not line:
            raise Done
        request, expected = json.loads(line), {"batch_size": self._size.batch_size, "steps": self._size.steps}
        if request != expected:
            raise ValueError(f"built for {expected}, asked for {request}")
        self._measured, self._started = not self._on_gpu, time.perf_counter()

    def _memory(self) -> int:
        """Bytes, the most so far: of the GPU, or of the process with its libraries."""
        import torch

        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(name: str, model: str, precision: str, device: str) -> None:
    """Build one contender and say what it is; then train for each line of standard input, until it ends."""
    with answering() as answer:
        if name in OWN:
            importlib.import_module("darkroom")  # before torch, as its commands do: it sets how OpenMP waits
        import torch

        rehearse_if_asked()
        torch.manual_seed(0)
        trainer = TRAINERS[name](model, precision, device)
        with torch.no_grad():
            answer({**describe(trainer), "threads": torch.get_num_threads()})
        with contextlib.suppress(Done):
            trainer.train(Turns(answer, size_of(model, device), device))


if __name__ == "__main__":
    main(*sys.argv[1:])
