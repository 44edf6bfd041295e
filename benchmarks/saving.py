"""What a checkpoint costs a training: python -m benchmarks.saving

Trains a recipe with a checkpoint every few steps. What the steps during and after a save take beyond the median of the
others, all that the copy, the thread that writes and its disk take away, is the cost of that checkpoint.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import interleaved, machine
from benchmarks.contenders import MODELS
from benchmarks.trainers import build, size_of

RESULTS = interleaved.RESULTS / "saving"
EVERY = {"A64": 6, "A32": 8, "digits": 35}  # steps between saves: enough for the writer to finish
SAVES = 4
INTERVAL = 300.0  # seconds between checkpoints that the share of the time is given for


def measure(name: str, device: str) -> dict[str, float]:
    """Seconds of a step without a save, seconds that one costs, and the size of the files in bytes."""
    from darkroom.training.checkpoints import path_of
    from darkroom.training.loop import Saving, train

    every = EVERY[name]
    steps = every * (SAVES + 1)
    network, batches, params = build(name, "bf16", device, steps=steps)
    ends: list[float] = []

    def on_tick(tick: Any) -> None:
        ends.append(time.perf_counter())

    assert steps < 200, "up to here there is a tick for each step"
    with tempfile.TemporaryDirectory() as directory, closing(batches):
        saving = Saving(every_seconds=1e9, every_steps=every, cost=1e9)
        train(network, batches, params, Path(directory), "", on_tick=on_tick, on_resume=print, saving=saving)
        size = path_of(Path(directory), steps).stat().st_size
    seconds = [b - a for a, b in pairwise(ends)]  # seconds[i] is step i + 2; the first one warms up
    # A save comes after the tick of its step, so it is in the time of the next one; the writer goes on from there.
    after = [seconds[save * every - 1 : save * every - 1 + every // 2] for save in range(1, SAVES + 1)]
    rest = [value for save in range(SAVES + 1) for value in seconds[save * every + every // 2 : (save + 1) * every - 1]]
    usual = statistics.median(rest)
    costs = [sum(value - usual for value in some) for some in after]
    return {
        "step": usual,
        "cost": statistics.median(costs),
        "bytes": size,
        "batch_size": size_of(name, device).batch_size,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a line for each model; with --write keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/saving")
    options = parser.parse_args(arguments)
    here = machine.describe()
    print(machine.sentence(here))
    found = {}
    for name in options.models:
        found[name] = values = measure(name, options.device)
        print(
            f"{name}: a step of {values['batch_size']} images {values['step']:.3g} s, a checkpoint of"
            f" {values['bytes'] / 1e6:.0f} MB costs {values['cost']:.2g} s: every {INTERVAL:.0f} s"
            f" {values['cost'] / INTERVAL:.2%} of the time",
            flush=True,
        )
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{machine.slug(here)}.json"
        path.write_text(json.dumps({"machine": here, "models": found}, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
