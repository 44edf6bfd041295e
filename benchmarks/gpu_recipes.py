"""Recipes from their first step to their FID by the core alone, and what a GPU machine lacks for that.

`python -m benchmarks.gpu --pack DIR` gathers it where all is installed: `site/`, packages for that machine's Python,
and an archive of the prepared images of each recipe.
"""

import contextlib
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import NUM_CLASSES, PEERS
from benchmarks.gpu_parts import Setting, synchronize
from benchmarks.interleaved import ROOT
from benchmarks.report import Result

if TYPE_CHECKING:
    from darkroom.data.dataset import DatasetInfo, Split

RECIPES = ("digits", "photos")
# What the core needs beside torch, numpy and what comes with them, and diffusers, the peer that is in the lock.
PACKAGES = ("pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection", "diffusers")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

TOY: dict[str, dict[str, Any]] = {
    "reference": {"steps": 3, "batch_size": 16, "min_accuracy": 0.0, "channels": [4, 8, 8]},
    "train": {"steps": 4, "batch_size": 2},
    "sample": {"steps": 2, "num_images": 10, "batch_size": 10, "seeds": [0]},
    "evaluate": {"kid_subsets": 2, "kid_subset_size": 5},
}
TOY_CHANNELS, TOY_EVERY = {"digits": [16, 16], "photos": [8, 8, 32, 32]}, {"digits": 18, "photos": 60}


def pack(directory: Path, python: str, recipes: Sequence[str] = RECIPES, packages: Sequence[str] = PACKAGES) -> None:
    """Fill `directory`: wheels of the locked `packages` for this version of Python, the peers, images of `recipes`.

    Raises InputError or StageFailed as the stage `prepare` does, and CalledProcessError when pip fails.
    """
    site = directory / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    if packages:
        _unpack_wheels(packages, python, site)
    if PEERS.is_dir():
        shutil.copytree(PEERS, site, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "bin"))
    for recipe in recipes:
        scratch = directory / f"{recipe}.scratch"
        prepared = prepare(recipe, scratch)
        (prepared / "manifest.parquet").unlink()
        shutil.make_archive(str(directory / recipe), "gztar", prepared)
        shutil.rmtree(scratch)


def _unpack_wheels(packages: Sequence[str], python: str, site: Path) -> None:
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    wheels = site.with_name("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"-d{wheels}"]
    command += ["--python-version", python, "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run([*command, *(f"{name}=={pins[name]}" for name in packages)], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)


def prepare(recipe: str, scratch: Path) -> Path:
    """Run the stage `prepare` of a recipe in `scratch`; returns the directory of what it packed."""
    from darkroom.stages import prepare as stage
    from darkroom.workspace import Workspace

    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "dvc.yaml").touch()
    shutil.copy(ROOT / "params" / f"{recipe}.yaml", scratch / "params.yaml")
    workspace = Workspace(scratch)
    stage.run(workspace)
    return workspace.prepared


@dataclass(frozen=True)
class Images:
    """The prepared images of a recipe, and what they are: "digits", or "random pictures" where there are none."""

    what: str
    info: "DatasetInfo"
    train: "Split"
    test: "Split"


def images_of(recipe: str, packed: Path | None, scratch: Path, every: int = 1) -> Images:
    """The images of a recipe: packed elsewhere, or prepared here, or random ones of the same shape; of each
    split one in `every`."""
    archive = packed / f"{recipe}.tar.gz" if packed else None
    if archive and archive.is_file():
        shutil.unpack_archive(archive, scratch / recipe, filter="data")
        return _thinned(recipe, *_load(scratch / recipe), every)
    try:
        prepared = prepare(recipe, scratch / recipe)
    except ImportError as error:
        print(f"{recipe}: cannot be prepared here, {error}: random pictures of this shape instead")
        return _thinned("random pictures", *_random(recipe), every)
    return _thinned(recipe, *_load(prepared), every)


def _load(prepared: Path) -> tuple[Any, Any, Any]:
    from darkroom.data.dataset import load_info, load_split

    return load_info(prepared), load_split(prepared, "train"), load_split(prepared, "test")


def _random(recipe: str) -> tuple[Any, Any, Any]:
    import numpy as np

    from darkroom.data.dataset import DatasetInfo, Split
    from darkroom.params import load_params

    data = load_params(ROOT / "params" / f"{recipe}.yaml").data
    count = data.num_classes or NUM_CLASSES
    generator = np.random.default_rng(0)

    def split(size: int) -> Split:
        shape = (size, data.channels, data.image_size, data.image_size)
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        return Split(images, np.arange(size) % count)

    classes = [str(label) for label in range(count)]
    info = DatasetInfo(
        name="random", image_size=data.image_size, channels=data.channels, classes=classes, splits={}, digest="0" * 64
    )
    return info, split(1500), split(300)


def _thinned(what: str, info: Any, train: Any, test: Any, every: int) -> Images:
    from darkroom.data.dataset import Split

    train, test = (Split(split.images[::every], split.labels[::every]) for split in (train, test))
    splits = {"train": len(train.labels), "test": len(test.labels)}
    return Images(what, info.model_copy(update={"splits": splits}), train, test)


def run(name: str, setting: Setting, share: float | None = None) -> Iterator[Result]:
    """Reference, train, sample and evaluate as the stages of these names do, with the seconds of each; and a grid.

    With `share` the training is as long as fits into this share of the time, by the speed of its first steps.
    """
    import torch

    from darkroom.device import choose_device, memory_explained
    from darkroom.diffusion.model import DiffusionModel
    from darkroom.evaluation.drawing import draw_samples, load_raw
    from darkroom.evaluation.fitting import fit_extractor
    from darkroom.evaluation.reference import write_reference
    from darkroom.evaluation.score import score_samples
    from darkroom.params import load_params
    from darkroom.training.loop import Trained, train
    from darkroom.training.outputs import write_model
    from darkroom.training.setup import set_up
    from darkroom.training.ticks import Tick

    device, params = choose_device(), load_params(ROOT / "params" / f"{name}.yaml")
    if setting.rehearsal:
        parts = {part: getattr(params, part).model_copy(update=changes) for part, changes in TOY.items()}
        toy = params.train.model.model_copy(update={"channels": TOY_CHANNELS[name]})
        params = params.model_copy(update=parts | {"train": parts["train"].model_copy(update={"model": toy})})
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        images = images_of(name, setting.packed, directory, every=TOY_EVERY[name] if setting.rehearsal else 1)
        real, held_out = (
            (torch.from_numpy(split.images.copy()), torch.from_numpy(split.labels.copy()))
            for split in (images.train, images.test)
        )
        result: Result = {"recipe": name, "images": images.what, "num_images": len(real[0]), "seconds": {}}

        @contextlib.contextmanager
        def stage(what: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            synchronize(setting.device)
            result["seconds"][what] = time.perf_counter() - started

        def trained(steps: int, where: str) -> tuple[Trained, list[Tick]]:
            settings, ticks = params.train.model_copy(update={"steps": steps}), list[Tick]()
            with memory_explained(device, settings.batch_size):
                network, batches = set_up(settings, images.info, images.train, device)
                with contextlib.closing(batches):
                    place = directory / where
                    done = train(network, batches, settings, place, "", on_tick=ticks.append, on_resume=print)
            return done, ticks

        steps = params.train.steps
        if share is not None:
            _, ticks = trained(4 if setting.rehearsal else 50, "trial")
            speed = median(tick.images_per_second for tick in ticks[len(ticks) // 2 :])
            fitting = int(share * setting.seconds * speed / params.train.batch_size)
            steps = steps if setting.rehearsal else max(steps, fitting)
        with stage("train"):
            done, ticks = trained(steps, "checkpoints")
            settings = params.train.model_copy(update={"steps": steps})
            write_model(directory / "models", done, settings, images.info, "")
        speeds = [tick.images_per_second for tick in ticks]
        result |= {"steps": steps, "batch_size": settings.batch_size, "images_per_second": median(speeds)}
        result |= {"first_loss": ticks[0].loss, "loss": ticks[-1].loss, "memory": ticks[-1].memory}
        yield result
        with stage("sample"):
            model = DiffusionModel.load(directory / "models", device)
            counts = torch.bincount(real[1], minlength=model.card.num_labels).tolist()
            samples = draw_samples(model, params.sample, counts, raw=load_raw(directory / "models", model))
        assert samples is not None  # there is one process
        write_grid(samples.guided, samples.guided_labels, setting.out / f"{name}.png")
        result["grid"] = f"{name}.png"
        yield result
        with stage("reference"):
            extractor = fit_extractor(
                directory / "extractor", real, held_out, images.info.classes, "", params.reference, device=device
            )
            limit = params.reference.max_features
            write_reference(
                directory / "extractor", extractor, real, held_out, params.reference.seed, max_features=limit
            )
        yield result
        with stage("evaluate"):
            scored = score_samples(samples, directory / "extractor", params.evaluate, device=device)
        assert scored is not None
        record = scored.record
        result |= {"fid": record.unguided.fid.value, "floor": record.floor.fid}
        for key, found in (("accuracy", record.unguided), ("guided_accuracy", record.guided)):
            assert found.class_accuracy is not None  # both have classes
            result[key] = found.class_accuracy.value
        yield result


def write_grid(images: Any, labels: Any, path: Path) -> None:
    """Write a PNG of uint8 `images` (N, C, H, W), up to 16 of each of 10 labels in a row; needs no Pillow."""
    import torch

    rows = [images[labels == label][:16] for label in torch.unique(labels).tolist()[:10]]
    columns = min(map(len, rows))
    picture = torch.cat([torch.cat(list(row[:columns]), dim=2) for row in rows], dim=1)  # (C, H, W)
    zoom = max(1, 48 // images.shape[-1])
    pixels = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).movedim(0, -1).contiguous().numpy()
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
