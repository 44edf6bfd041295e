"""Time training beside diffusers and denoising-diffusion-pytorch: python -m benchmarks.training

Every contender trains in a process of its own, in each precision. They run in turn, a few steps at a time, round after
round, and are compared within a round: a machine that is slower for a minute is so for all of them.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import interleaved, machine, report, training_report
from benchmarks.interleaved import README, ROOT, Process, running
from benchmarks.trainers import TRAINERS, size_of

RESULTS = interleaved.RESULTS / "training"


def benchmark(result: report.Result, options: argparse.Namespace, model: str, device: str) -> None:
    """Add what one model takes, all contenders and precisions in the same rounds, to `result`."""
    size = size_of(model, device)
    rounds = options.rounds or size.rounds
    names = list(TRAINERS if device == "cuda" else training_report.COLUMNS)
    contenders = [(name, precision) for precision in options.precisions for name in names]
    print(f"{model} on {device}: starting {', '.join(names)} in {' and '.join(options.precisions)}", flush=True)
    with contextlib.ExitStack() as stack:
        started: dict[str, Process] = {}
        for name, precision in contenders:
            key = training_report.key(name, precision)
            command = [sys.executable, "-m", "benchmarks.trainers", name, model, precision, device]
            started[key] = stack.enter_context(running(key, command))
        for (name, _), process in zip(contenders, started.values(), strict=True):
            result["models"].setdefault(model, {})[name] = process.answer()
        asks = {key: process.ask for key, process in started.items()}
        case: report.Case = {"model": model, "device": device, "batch_size": size.batch_size, "steps": size.steps}
        case |= interleaved.measure(asks, size.batch_size, size.steps, rounds)
    result["cases"].append(case)
    speeds = ", ".join(f"{key} {training_report.images_per_second(case, key):.3g}" for key in asks)
    print(f"{model} on {device}, batch {size.batch_size}, {rounds} rounds, images/s: {speeds}", flush=True)


def write(result: report.Result) -> None:
    """Keep the raw times, and renew the tables from the results of every machine."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{machine.slug(result['machine'])}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    tables = training_report.render(kept())
    README.write_text(report.insert(README.read_text(), tables, training_report.START, training_report.END))
    print(f"Wrote {path.relative_to(ROOT)} and the tables of {README.relative_to(ROOT)}.")


def kept() -> list[report.Result]:
    """The results of every machine so far."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def main(arguments: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[1]
    render: Any = lambda result: training_report.render([result])  # noqa: E731
    return interleaved.main("training", description, benchmark, render, write, arguments)


if __name__ == "__main__":
    sys.exit(main())
