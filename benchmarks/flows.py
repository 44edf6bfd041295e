"""What the flow costs beyond plain `dvc repro`: python -m benchmarks.flows

Runs a chain of stages that do nothing, with two lengths, as `dvc repro` and as `python -m flows.reproduce` on a Prefect
server that is up already. The difference grows with the number of stages: its slope is the cost of a stage, the rest is
start-up. Both ways alternate within a round, so that a slow drift of the machine cancels.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import interleaved, machine

REPOSITORY = Path(__file__).parents[1]
RESULTS = interleaved.RESULTS / "flows"
LENGTHS = (2, 8)  # stages of the two chains
DVC = [sys.executable, "-P", "-m", "dvc"]
FLOW = [sys.executable, "-m", "flows.reproduce"]

Round = dict[int, tuple[float, float]]  # length -> seconds of `dvc repro`, seconds of the flow


def make_chain(root: Path, length: int) -> None:
    """A project with stages that take no time, each depending on the one before."""
    root.mkdir()
    shutil.copy(REPOSITORY / "params.yaml", root)
    stages = {"s0": {"cmd": "echo 0 > 0", "outs": ["0"]}}
    for number in range(1, length):
        before = str(number - 1)
        stages[f"s{number}"] = {"cmd": f"cp {before} {number}", "deps": [before], "outs": [str(number)]}
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run([*DVC, "init", "-q"], cwd=root, check=True)


def seconds(command: Sequence[str], root: Path) -> float:
    """How long a command takes in the project at `root`."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
    }
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def measure(directory: Path, rounds: int, force: bool) -> list[Round]:
    """Every round's seconds; with `force` each stage runs, without it all are up to date."""
    options = ["--force"] if force else []
    ways = ([*DVC, "repro", *options], [*FLOW, *options])
    roots = {length: directory / str(length) for length in LENGTHS}
    for root in roots.values():
        seconds(ways[0], root)  # the first run fills caches
    found: list[Round] = []
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        found.append({})
        for length, root in roots.items():
            times = {way: seconds(ways[way], root) for way in order}
            found[-1][length] = (times[0], times[1])
    return found


def summary(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Median, lowest and highest over the rounds: of a stage's cost, of start-up, and of plain DVC's time per stage."""
    short, long = LENGTHS
    rows = []
    for times in rounds:
        extra = {length: flow - plain for length, (plain, flow) in times.items()}
        stage = (extra[long] - extra[short]) / (long - short)
        rows.append((stage, extra[short] - short * stage, (times[long][0] - times[short][0]) / (long - short)))
    names = ("stage", "start-up", "dvc repro, per stage")
    columns = zip(*rows, strict=True)
    return {n: [statistics.median(c), min(c), max(c)] for n, c in zip(names, columns, strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; with --write keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/flows")
    options = parser.parse_args(arguments)
    here = machine.describe()
    print(machine.sentence(here))
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"PREFECT_HOME": f"{name}/prefect", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness

        for length in LENGTHS:
            make_chain(Path(name) / str(length), length)
        with prefect_test_harness(server_startup_timeout=120):
            os.environ["PREFECT_API_URL"] = str(PREFECT_API_URL.value())
            for what, force in (("every stage runs", True), ("all is up to date", False)):
                found[what] = summary(measure(Path(name), options.rounds, force))
                for quantity, (median, lowest, highest) in found[what].items():
                    print(f"{what}: {quantity} {median:.2f} s ({lowest:.2f} to {highest:.2f})", flush=True)
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        content = {"machine": here, "rounds": options.rounds, "seconds": found}
        text = json.dumps(content, indent=1, sort_keys=True)
        (RESULTS / f"{machine.slug(here)}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
