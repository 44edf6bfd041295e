"""What scores cost, given the features: python -m benchmarks.scores

Two sets of random float32 features, as many and as wide as Inception's of 50,000 images, lie in files that are mapped
into memory. Each score is computed from them in a process of its own, for its time and the most memory it held; the
memory counts the pages of the files too. FID is also computed from a quarter of the images: what the files do not
account for has to stay the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import interleaved, machine

RESULTS = interleaved.RESULTS / "scores"
SETS = ("real", "generated")
ROUNDS = 3  # of FID; the others are run once


def make_features(directory: Path, images: int, dimensions: int) -> None:
    """Positive features, as they are after Inception's last pooling."""
    for number, name in enumerate(SETS):
        features = np.lib.format.open_memmap(
            directory / f"{name}.npy", mode="w+", dtype=np.float32, shape=(images, dimensions)
        )
        generator = np.random.default_rng(number)
        for start in range(0, images, 1000):
            part = features[start : start + 1000]
            part[:] = np.abs(generator.standard_normal(part.shape, dtype=np.float32)) * (1 + 0.05 * number)


def work(score: str, directory: Path, images: int) -> dict[str, Any]:
    """Compute one score from the first `images` of both sets; seconds of its steps and bytes of this process."""
    from darkroom.evaluation.distances import Moments, frechet_distance  # before torch: it sets how threads wait
    from darkroom.evaluation.neighbours import Manifold, precision_recall
    from darkroom.evaluation.uncertainty import fid_deviation, fid_infinity

    import torch  # isort: skip

    real, generated = (torch.from_numpy(np.load(directory / f"{name}.npy", mmap_mode="c")[:images]) for name in SETS)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def done(step: str) -> None:
        seconds[step] = time.perf_counter() - began - sum(seconds.values())

    if score == "precision and recall":
        manifold = Manifold(real)
        done("manifold of real images")
        precision_recall(manifold, generated)
        done("both")
    else:
        reference = Moments.of(real)
        done("moments of real images")
        if score == "FID":
            moments = Moments.of(generated)
            done("moments of generated images")
            frechet_distance(reference, moments)
            done("distance")
        elif score == "deviation of FID":
            fid_deviation(reference, [generated], torch.arange(images) % 10)
            done("deviation")
        else:
            fid_infinity(reference, generated, torch.arange(images) % 10, 0)
            done("extrapolation")
    return {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure(score: str, directory: Path, images: int) -> dict[str, Any]:
    """`work` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scores", "--only", score, "--images", str(images)]
    finished = subprocess.run(
        [*command, "--directory", str(directory)], cwd=interleaved.ROOT, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(finished.stdout)
    return found | {"score": score, "images": images}


def runs(images: int, neighbours: int) -> Iterator[tuple[str, int]]:
    """What is measured: scores, each with its number of images."""
    yield from [("FID", images // 4), ("FID", images)] * ROUNDS
    yield "deviation of FID", images
    yield "FID of infinitely many images", images
    yield "precision and recall", neighbours


def line(run: dict[str, Any]) -> str:
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run["seconds"].items())
    total = sum(run["seconds"].values())
    return f"{run['score']}, {run['images']:,} images: {total:.1f} s ({steps}), {run['bytes'] / 1e9:.2f} GB of memory"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; with --write keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--images", type=int, default=50_000, metavar="N")
    parser.add_argument("--dimensions", type=int, default=2048, metavar="F")
    parser.add_argument(
        "--neighbours",
        type=int,
        default=10_000,
        metavar="N",
        help="images for precision and recall: 50,000 take 25 times as long",
    )
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/scores")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the score that this process is to compute
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # where its features are
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(work(options.only, options.directory, options.images)))
        return 0
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        make_features(Path(temporary), options.images, options.dimensions)
        for score, images in runs(options.images, options.neighbours):
            found.append(measure(score, Path(temporary), images))
            print(line(found[-1]), flush=True)
    here = machine.describe()
    print(machine.sentence(here))
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        kept = {"machine": here, "dimensions": options.dimensions, "runs": found}
        (RESULTS / f"{machine.slug(here)}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
