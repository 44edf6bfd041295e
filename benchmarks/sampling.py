"""Time sampling beside diffusers and denoising-diffusion-pytorch: python -m benchmarks.sampling

Every contender builds its network in a process of its own and waits. They then run in turn, one at a time, round after
round, and are compared within a round: a machine that is slower for a minute is so for all of them.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import interleaved, machine, report
from benchmarks.contenders import CONTENDERS, MODELS
from benchmarks.interleaved import README, RESULTS, ROOT, Ask, Process, running

GPU_BATCH_SIZES, GPU_STEPS, GPU_ROUNDS = (8, 64, 256), 20, 5


def measure(contenders: Mapping[str, Ask], batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """What the measured runs took: "seconds" by contender; of ours also the "loop" and the "network" in it."""
    runs = interleaved.measure(contenders, batch_size, steps, rounds)
    return {"seconds": runs["seconds"], **{key: runs[key][report.OURS] for key in ("loop", "network")}}


def benchmark(result: report.Result, options: argparse.Namespace, model: str, device: str) -> None:
    """Add what one model takes in each precision to `result`."""
    on_gpu, own = device == "cuda", MODELS[model]
    names = list(CONTENDERS if on_gpu else report.COLUMNS)
    steps = GPU_STEPS if on_gpu else own.steps
    rounds = options.rounds or (GPU_ROUNDS if on_gpu else own.rounds)
    for precision in options.precisions:
        label = f"{model} {precision} on {device}"
        print(f"{label}: starting {', '.join(names)}", flush=True)
        with contextlib.ExitStack() as stack:
            started: dict[str, Process] = {}
            for name in names:
                command = [sys.executable, "-m", "benchmarks.contenders", name, model, precision, device]
                started[name] = stack.enter_context(running(name, command))
            networks = {name: process.answer() for name, process in started.items()}
            result["models"].setdefault(model, {}).update(networks)
            for batch_size in GPU_BATCH_SIZES if on_gpu else own.batch_sizes:
                asks = {name: process.ask for name, process in started.items()}
                case = {"model": model, "precision": precision, "device": device, "batch_size": batch_size}
                case |= {"steps": steps} | measure(asks, batch_size, steps, rounds)
                result["cases"].append(case)
                times = ", ".join(f"{name} {1e3 * report.per_step_and_image(case, name):.3g}" for name in names)
                print(f"{label}, batch {batch_size}, {rounds} rounds, ms per step and image: {times}", flush=True)


def write(result: report.Result) -> None:
    """Keep the raw times, and renew the tables from the results of every machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine.slug(result['machine'])}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    README.write_text(report.insert(README.read_text(), report.render(results)))
    print(f"Wrote {path.relative_to(ROOT)} and the tables of {README.relative_to(ROOT)}.")


def main(arguments: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[1]
    return interleaved.main(
        "sampling", description, benchmark, lambda result: report.render([result]), write, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
