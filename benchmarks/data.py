"""What preparing, checking and reading data costs: python -m benchmarks.data

Synthetic 64x64 PNG files go through the stages prepare and validate, in turn with a plain loop over the same files of
the kind that an image folder is usually read with; then training batches are read from what was packed. --full runs the
1,281,167 images of ImageNet once, from a zip file, for time and memory.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks import interleaved, machine

RESULTS = interleaved.RESULTS / "data"
IMAGENET = 1_281_167
SIZE = 64
CLASSES = 100
ROUNDS = 3
BATCH = 128
BATCHES = 200  # that are read from the packed form; a tenth of them is decoded from files


def png(number: int) -> bytes:
    """A crop of a photograph, brightened at random: about 7 kB, and no two alike."""
    import io

    from PIL import Image

    generator = np.random.default_rng(number)
    photo = _photos()[number % 2]
    y, x = (int(generator.integers(0, side - SIZE)) for side in photo.shape[:2])
    crop = photo[y : y + SIZE, x : x + SIZE] * generator.uniform(0.6, 1.0) + generator.uniform(0, 20, 3)
    buffer = io.BytesIO()
    Image.fromarray(crop.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _photos(known: list[Any] = []) -> list[Any]:  # noqa: B006 (read once per process)
    if not known:
        from sklearn.datasets import load_sample_images

        known += load_sample_images().images
    return known


def _pngs(numbers: range) -> list[bytes]:
    return [png(number) for number in numbers]


def _made(count: int) -> Iterator[tuple[str, bytes]]:
    """`count` images with their names below a directory per class."""
    parts = [range(first, min(first + 500, count)) for first in range(0, count, 500)]
    with ProcessPoolExecutor() as processes:
        for numbers, contents in zip(parts, processes.map(_pngs, parts), strict=True):
            for number, content in zip(numbers, contents, strict=True):
                yield f"{number % CLASSES:03d}/{number:07d}.png", content


def make_folder(root: Path, count: int) -> None:
    for name in range(CLASSES):
        (root / f"{name:03d}").mkdir(parents=True)
    for name, content in _made(count):
        (root / name).write_bytes(content)


def make_zip(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in _made(count):
            archive.writestr(name, content)


def make_project(root: Path, source: Path) -> None:
    """What the stages need, with the recipe for ImageNet-64."""
    params = yaml.safe_load((interleaved.ROOT / "params" / "imagenet64.yaml").read_text())
    params["data"] |= {"source": str(source), "num_classes": CLASSES, "test_fraction": 0.02}
    params["validate"]["min_images_per_class"] = 10
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "dvc.yaml").touch()
    shutil.copytree(interleaved.ROOT / "expectations", root / "expectations")


def run_stage(root: Path, name: str) -> dict[str, float]:
    """Seconds that a stage takes as a whole process, and the most memory that it and its children held, in bytes."""
    began, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", f"darkroom.stages.{name}"], cwd=root, stdout=subprocess.DEVNULL)
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        parent = psutil.Process(process.pid)
        while not ended.wait(0.25):
            try:
                family = [parent, *parent.children(recursive=True)]
                most = max(most, sum(one.memory_full_info().pss for one in family))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"the stage {name} ended with exit code {code}")
    return {"seconds": seconds, "bytes": most}


def plain_loop(samples: Sequence[tuple[str, int]]) -> Iterator[Any]:
    """Batches as an ImageFolder with ToTensor and Normalize gives them to one process."""
    import torch
    from PIL import Image

    half = torch.full((3, 1, 1), 0.5)
    batch = []
    for path, label in samples:
        with open(path, "rb") as file:  # noqa: PTH123
            image = Image.open(file).convert("RGB")
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True)).permute(2, 0, 1).contiguous()
        batch.append((pixels.to(torch.float32).div(255).sub_(half).div_(half), torch.tensor(label)))
        if len(batch) == BATCH:
            yield tuple(map(torch.stack, zip(*batch, strict=True)))
            batch = []


def list_samples(root: Path) -> list[tuple[str, int]]:
    return [
        (os.path.join(parent, name), label)  # noqa: PTH118
        for label, directory in enumerate(sorted(path for path in root.iterdir()))
        for parent, _, names in sorted(os.walk(directory))
        for name in sorted(names)
    ]


def time_plain_loop(root: Path) -> float:
    """Seconds of the loop over all images, the listing included."""
    began = time.perf_counter()
    for _ in plain_loop(list_samples(root)):
        pass
    return time.perf_counter() - began


def time_reading(prepared: Path, folder: Path) -> dict[str, float]:
    """Images per second from the packed form, in training's order, and from the files."""
    import torch

    from darkroom.data.dataset import load_split
    from darkroom.training.batches import DataOrder
    from darkroom.training.streaming import StreamedImages

    torch.set_num_threads(1)
    split = load_split(prepared, "train")
    images = StreamedImages(split.images, split.labels, DataOrder(0, len(split.labels)), torch.device("cpu"))
    images(0, BATCH)
    for start in range(0, len(split.images), 4096):  # into the page cache
        split.images[start : start + 4096].max()
    began = time.perf_counter()
    for number in range(1, BATCHES + 1):
        images(number * BATCH, BATCH)
    packed = BATCHES * BATCH / (time.perf_counter() - began)
    images.close()
    samples = list_samples(folder)
    order = np.random.default_rng(0).permutation(len(samples))[: BATCHES // 10 * BATCH]
    chosen = [samples[i] for i in order]
    list(plain_loop(chosen[: 2 * BATCH]))
    began = time.perf_counter()
    for _ in plain_loop(chosen):
        pass
    return {"packed": packed, "files": len(chosen) / (time.perf_counter() - began)}


def measure(count: int, work: Path) -> dict[str, Any]:
    """Prepare against the plain loop in turn, validation, and reading."""
    folder = work / "images"
    make_folder(folder, count)
    make_project(work, folder)
    found: dict[str, Any] = {"images": count, "plain": [], "prepare": [], "reading": []}
    time_plain_loop(folder)  # everything is in the page cache from here on
    for _ in range(ROUNDS):
        found["plain"].append(time_plain_loop(folder))
        found["prepare"].append(run_stage(work, "prepare"))
        found["reading"].append(time_reading(work / "data" / "prepared", folder))
    found["validate"] = run_stage(work, "validate")
    return found


def measure_full(count: int, work: Path) -> dict[str, Any]:
    """Time and memory of both stages over a zip file of `count` images."""
    make_zip(work / "images.zip", count)
    make_project(work, work / "images.zip")
    return {"images": count, **{name: run_stage(work, name) for name in ("prepare", "validate")}}


def lines(found: dict[str, Any]) -> Iterator[str]:
    count = found["images"]
    if "plain" in found:
        plain = statistics.median(found["plain"])
        prepare = statistics.median(run["seconds"] for run in found["prepare"])
        ratios = [a / b["seconds"] for a, b in zip(found["plain"], found["prepare"], strict=True)]
        yield (
            f"prepare, {count:,} PNG files of {SIZE}x{SIZE}: {count / prepare:,.0f} images/s, a plain loop"
            f" {count / plain:,.0f}: {statistics.median(ratios):.2f} times ({min(ratios):.2f}–{max(ratios):.2f})"
        )
        rates = [run["packed"] / run["files"] for run in found["reading"]]
        packed = statistics.median(run["packed"] for run in found["reading"])
        yield (
            f"batches of {BATCH} from the packed form: {packed:,.0f} images/s, {packed * 3 * SIZE**2 / 1e9:.2f} GB/s;"
            f" {statistics.median(rates):.0f} times decoding files ({min(rates):.0f}–{max(rates):.0f})"
        )
        runs = {"prepare": found["prepare"][0], "validate": found["validate"]}
    else:
        runs = {name: found[name] for name in ("prepare", "validate")}
    for name, run in runs.items():
        yield f"{name}, {count:,} images: {run['seconds']:.1f} s, {run['bytes'] / 1e9:.2f} GB of memory"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; with --write keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--images", type=int, metavar="N", help="100000, with --full 1281167")
    parser.add_argument("--full", action="store_true", help="once over a zip file, for time and memory; takes 45 GB")
    parser.add_argument("--directory", help="where to put the images (default: a temporary directory)")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/data")
    options = parser.parse_args(arguments)
    here = machine.describe()
    print(machine.sentence(here), flush=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        if options.full:
            found = measure_full(options.images or IMAGENET, Path(work))
        else:
            found = measure(options.images or 100_000, Path(work))
    print(*lines(found), sep="\n")
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{machine.slug(here)}{'-full' if options.full else ''}.json"
        path.write_text(json.dumps({"machine": here, "found": found}, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
