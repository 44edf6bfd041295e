"""The models, and the libraries that sample from them, each in a process of its own that is told what to run.

A contender is used as its documentation shows it: own network, own scheduler, default settings, default allocator.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

PEERS = Path(__file__).parents[1] / ".venv" / "bench"  # where the Makefile puts benchmarks/requirements.txt
NUM_CLASSES = 10


@dataclass(frozen=True)
class Model:
    """One architecture, in the terms of `darkroom.nets.unet.UNet`."""

    image_size: int
    image_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    head_channels: int
    norm_groups: int
    time_conditioning: str
    schedule: str
    batch_sizes: tuple[int, ...]  # measured on the CPU
    steps: int  # of one timed run there
    rounds: int


MODELS = {
    "A64": Model(64, 3, (64, 128, 256, 512), 2, (16, 8), 64, 32, "additive", "cosine", (1, 8), 3, 5),
    "A32": Model(32, 3, (128, 256, 256, 256), 2, (16,), 256, 32, "additive", "linear", (1, 8), 3, 5),
    "digits": Model(8, 1, (32, 64), 1, (4,), 16, 16, "scale_shift", "cosine", (1, 16, 64), 10, 15),
}


REHEARSAL = "DARKROOM_REHEARSAL"  # set in the environment: `benchmarks.gpu --rehearse`


def rehearse_if_asked() -> bool:
    """In a rehearsal A64 is a toy in this process, and compiling takes no time: every line runs, no figure counts."""
    if not os.environ.get(REHEARSAL):
        return False
    import torch

    toy = {"image_size": 16, "channels": (16, 32), "num_res_blocks": 1, "attention_resolutions": (8,)}
    MODELS["A64"] = replace(MODELS["A64"], head_channels=16, norm_groups=8, **toy)  # type: ignore[arg-type]
    torch.compile = partial(torch.compile, backend="eager")
    return True


class Clock:
    """Adds up the time spent inside the functions it wraps, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@dataclass(frozen=True)
class Contender:
    """`sample(batch_size, steps)` draws images from noise to x_0; `network` is what is counted."""

    library: str
    network: Any  # torch.nn.Module
    forward: Callable[[], Any]  # of one image, for the count of its operations
    sample: Callable[[int, int], Any]
    clocks: dict[str, Clock] = field(default_factory=dict)  # ours only: how long its loop took, and the network in it


def ours(model: Model, precision: Any, device: str, compiled: bool = False) -> Contender:
    """Darkroom's DiffusionModel.draw with DPM-Solver++(2M), from the noise of each image to its uint8 pixels."""
    import torch

    from darkroom.diffusion.model import DiffusionModel
    from darkroom.diffusion.samplers import SAMPLERS
    from darkroom.nets.inference import InferenceUNet
    from darkroom.params import DrawParams

    loop, network, plan = Clock(), Clock(), InferenceUNet.plan
    SAMPLERS["dpmpp_2m"] = loop.wrap(SAMPLERS["dpmpp_2m"])
    InferenceUNet.plan = lambda *arguments: network.wrap(plan(*arguments))  # type: ignore[method-assign]
    unet = _unet(model).to(device)
    drawn = DiffusionModel(card(model), unet, compiled=compiled)
    settings = DrawParams(
        sampler="dpmpp_2m",
        steps=1,
        spacing="trailing",
        eta=0.0,
        clipping="static",
        guidance_scale=1.0,
        guidance_interval=None,
        precision=precision,
    )

    def sample(batch_size: int, steps: int) -> torch.Tensor:
        return drawn.draw(_labels(batch_size, "cpu"), settings.changed(steps=steps), seed=0, batch_size=batch_size)

    return Contender(
        "darkroom", unet, lambda: unet(*example(model, device)), sample, {"loop": loop, "network": network}
    )


def plain(model: Model, precision: str, device: str) -> Contender:
    """Darkroom's UNet as it is trained, in the same sampler: the difference is what its inference plan gains."""
    import torch

    from darkroom.diffusion.guidance import guided
    from darkroom.diffusion.samplers import dpmpp_2m
    from darkroom.diffusion.schedules import make_schedule
    from darkroom.diffusion.timesteps import spaced_timesteps

    unet = _unet(model).to(device)
    schedule = make_schedule(model.schedule, 1000)  # type: ignore[arg-type]

    def network(x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            eps: torch.Tensor = unet(x, torch.full((len(x),), t, device=device), labels)
        return eps

    def sample(batch_size: int, steps: int) -> torch.Tensor:
        x, labels = torch.randn(_shape(model, batch_size), device=device), _labels(batch_size, device)
        denoise = guided(network, labels, 1.0, NUM_CLASSES)
        return dpmpp_2m(denoise, x, schedule, spaced_timesteps(schedule, steps))

    return Contender("darkroom", unet, lambda: unet(*example(model, device)), sample)


def diffusers(model: Model, precision: str, device: str, compiled: bool = False) -> Contender:
    """UNet2DModel of the same architecture and DPMSolverMultistepScheduler; bf16 by casting the model."""
    import torch

    library: Any = importlib.import_module("diffusers")
    unet = diffusers_unet(model).eval()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    unet.to(device=device, dtype=dtype)
    called = torch.compile(unet) if compiled else unet
    schedule = "squaredcos_cap_v2" if model.schedule == "cosine" else "linear"
    scheduler = library.DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_schedule=schedule)

    def sample(batch_size: int, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps, device=device)
        x = torch.randn(_shape(model, batch_size), device=device, dtype=dtype)
        labels = _labels(batch_size, device)
        for t in scheduler.timesteps:
            x = scheduler.step(called(x, t, class_labels=labels).sample, t, x).prev_sample
        return x

    def forward() -> torch.Tensor:
        x, t, labels = example(model, device)
        return unet(x.to(dtype), t, class_labels=labels).sample

    return Contender(f"diffusers {library.__version__}", unet, forward, sample)


def denoising_diffusion(model: Model, precision: str, device: str) -> Contender:
    """denoising-diffusion-pytorch: the closest of its UNets, unconditional, and its DDIM; bf16 under autocast."""
    import torch

    diffusion = gaussian_diffusion(model, sampling_timesteps=1).eval().to(device)
    unet = diffusion.model

    def sample(batch_size: int, steps: int) -> torch.Tensor:
        diffusion.sampling_timesteps = steps
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            images: torch.Tensor = diffusion.sample(batch_size=batch_size)
        return images

    name = "denoising-diffusion-pytorch"
    return Contender(f"{name} {version(name)}", unet, lambda: unet(*example(model, device)[:2]), sample)


OWN = ("darkroom", "darkroom compiled", "plain UNet")
CONTENDERS: dict[str, Callable[[Model, str, str], Contender]] = {
    "darkroom": ours,
    "darkroom compiled": partial(ours, compiled=True),
    "plain UNet": plain,
    "diffusers": diffusers,
    "diffusers compiled": partial(diffusers, compiled=True),
    "denoising-diffusion-pytorch": denoising_diffusion,
}


def card(model: Model) -> Any:
    """The `model.json` that a training of this model would write, without the digests of any."""
    from darkroom.diffusion.card import ModelCard

    unet = {
        "channels": list(model.channels),
        "num_res_blocks": model.num_res_blocks,
        "attention_resolutions": list(model.attention_resolutions),
        "head_channels": model.head_channels,
        "norm_groups": model.norm_groups,
        "dropout": 0.0,
        "time_conditioning": model.time_conditioning,
    }
    return ModelCard.model_validate(
        {
            "image_size": model.image_size,
            "channels": model.image_channels,
            "classes": [str(label) for label in range(NUM_CLASSES)],
            "unet": unet,
            "schedule": {"name": model.schedule, "num_timesteps": 1000},
            "label_dropout": 0.1,
            "fingerprint": "",
            "data_digest": "",
            "weights_digest": "",
        }
    )


def diffusers_unet(model: Model) -> Any:
    """UNet2DModel with as many parameters and multiply-adds as ours."""
    library: Any = importlib.import_module("diffusers")
    sides = [model.image_size >> depth for depth in range(len(model.channels))]
    attention = ["Attn" if side in model.attention_resolutions else "" for side in sides]
    return library.UNet2DModel(
        sample_size=model.image_size,
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        layers_per_block=model.num_res_blocks,
        block_out_channels=model.channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in attention),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attention)),
        attention_head_dim=model.head_channels,
        norm_num_groups=model.norm_groups,
        num_class_embeds=NUM_CLASSES + 1,
        resnet_time_scale_shift="scale_shift" if model.time_conditioning == "scale_shift" else "default",
    )


def gaussian_diffusion(model: Model, **options: Any) -> Any:
    """denoising-diffusion-pytorch's GaussianDiffusion around its Unet of our widths."""
    package = import_denoising_diffusion()
    widths = tuple(width // model.channels[0] for width in model.channels)
    unet = package.Unet(model.channels[0], dim_mults=widths, channels=model.image_channels)
    options |= {"image_size": model.image_size, "objective": "pred_noise", "beta_schedule": model.schedule}
    return package.GaussianDiffusion(unet, **options)


def _unet(model: Model) -> Any:
    import torch

    unet = card(model).build()
    for parameter in unet.parameters():
        if not parameter.any():  # a fresh network has zeros where a trained one has none; a GPU is faster at zeros
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval().requires_grad_(False)


def _shape(model: Model, batch_size: int) -> tuple[int, int, int, int]:
    return batch_size, model.image_channels, model.image_size, model.image_size


def _labels(batch_size: int, device: str) -> Any:
    import torch

    return torch.arange(batch_size, device=device) % NUM_CLASSES


def example(model: Model, device: str) -> tuple[Any, Any, Any]:
    import torch

    return torch.randn(_shape(model, 1), device=device), torch.tensor([500], device=device), _labels(1, device)


def import_denoising_diffusion() -> Any:
    """It wants torchvision when it is imported, for its data set alone; an empty stand-in will do.

    The real one must not be installed: it would replace the build of torch that everything here runs on.
    """
    sys.path.append(str(PEERS))
    stand_in: Any = ModuleType("torchvision")
    stand_in.transforms = stand_in.utils = None
    sys.modules["torchvision"] = stand_in
    try:
        return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    finally:
        del sys.modules["torchvision"]


def describe(contender: Any) -> dict[str, Any]:
    """The size of a Contender or Trainer, and the multiply-accumulates of its plain forward pass of one image."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it cannot count a fused attention
        contender.forward()
    parameters = sum(parameter.numel() for parameter in contender.network.parameters())
    return {"library": contender.library, "parameters": parameters, "macs": counter.get_total_flops() // 2}


@contextlib.contextmanager
def answering() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Keep standard output for answers, one line of JSON each; what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as pipe:
        os.dup2(2, 1)
        yield lambda answer: print(json.dumps(answer), file=pipe, flush=True)


def main(name: str, model: str, precision: str, device: str) -> None:
    """Build one contender and say what it is; then run what each line of standard input asks for, until it ends."""
    with answering() as answer:
        if name in OWN:
            importlib.import_module("darkroom")  # before torch, as its commands do: it sets how OpenMP waits
        import torch

        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        rehearse_if_asked()
        torch.manual_seed(0)
        with torch.inference_mode():
            contender = CONTENDERS[name](MODELS[model], precision, device)
            answer({**describe(contender), "threads": torch.get_num_threads()})
            for line in sys.stdin:
                request = json.loads(line)
                for clock in contender.clocks.values():
                    clock.seconds = 0.0
                synchronize()
                start = time.perf_counter()
                contender.sample(request["batch_size"], request["steps"])
                synchronize()
                seconds = time.perf_counter() - start
                answer({"seconds": seconds, **{name: clock.seconds for name, clock in contender.clocks.items()}})


if __name__ == "__main__":
    main(*sys.argv[1:])
