"""Contenders in processes of their own, which run in turn, one at a time, round after round.

They are compared within a round: a machine that is slower for a minute is so for all of them.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks import machine
from benchmarks.contenders import MODELS, PEERS

# Nothing here may import darkroom: it sets how OpenMP waits, which the peers' processes would inherit.
ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BUSY = 0.5  # load average of the last minute
OURS_ALONE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # set by make and by darkroom itself; no peer's default


class ContenderFailed(Exception):
    """A contender's process ended instead of answering. The message has the last lines that it wrote."""


class Ask(Protocol):
    """One timed run: {"seconds": …} and whatever else a contender says about it."""

    def __call__(self, *, batch_size: int, steps: int) -> dict[str, float]: ...


class Process:
    """A contender's process, which answers each line of JSON with one. `errors` is what it writes to standard error."""

    def __init__(self, name: str, popen: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self.name, self._popen, self._errors = name, popen, errors

    def answer(self) -> dict[str, Any]:
        """Wait for its next line. Raises ContenderFailed when there is none."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            code = self._popen.wait()  # only then has it written everything
            self._errors.seek(0)
            raise ContenderFailed(
                f"{self.name} ended with exit code {code}:\n{''.join(self._errors.readlines()[-15:])}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, *, batch_size: int, steps: int) -> dict[str, float]:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() says why it is gone
            print(json.dumps({"batch_size": batch_size, "steps": steps}), file=self._popen.stdin, flush=True)
        return self.answer()


@contextlib.contextmanager
def running(name: str, command: Sequence[str]) -> Iterator[Process]:
    """Start `command`, and end it and whatever it started with the block: it has nothing to save."""
    environment = {key: value for key, value in os.environ.items() if key not in OURS_ALONE}
    with tempfile.TemporaryFile("w+") as errors:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
            process_group=0,  # Ctrl-C goes to this process alone, which then ends the others
        )
        try:
            yield Process(name, popen, errors)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            for pipe in (popen.stdin, popen.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]


def measure(contenders: Mapping[str, Ask], batch_size: int, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Run each contender once unmeasured and then in turn, the order reversed from round to round.

    Returns what they answered to the measured runs: a list for each key ("seconds", …) and contender.
    """
    for ask in contenders.values():
        ask(batch_size=batch_size, steps=steps)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            runs[name].append(contenders[name](batch_size=batch_size, steps=steps))
    keys = dict.fromkeys(key for answers in runs.values() for key in answers[0])
    return {key: {name: [run[key] for run in runs[name]] for name in runs if key in runs[name][0]} for key in keys}


def missing(peers: Path) -> list[str]:
    """The pinned peers that are not in the directory `peers`."""
    lines = (ROOT / "benchmarks" / "requirements.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if "==" in line]
    return [name for name, version in pinned if not (peers / f"{name.replace('-', '_')}-{version}.dist-info").is_dir()]


def has_fast_bf16(device: str) -> bool:
    """What darkroom finds, asked in a process of its own. Emulated bf16 is nobody's choice, and takes hours here."""
    found = "speed(torch.device(sys.argv[1])).bf16_is_faster"
    script = f"import sys, torch; from darkroom.arithmetic import speed; sys.exit(not {found})"
    return subprocess.run([sys.executable, "-c", script, device], check=False).returncode == 0


def main(
    name: str,
    description: str,
    benchmark: Callable[[dict[str, Any], argparse.Namespace, str, str], None],
    render: Callable[[dict[str, Any]], str],
    write: Callable[[dict[str, Any]], None],
    arguments: Sequence[str] | None,
) -> int:
    """The command `python -m benchmarks.<name>`; returns its exit code.

    `benchmark(result, options, model, device)` adds what one model takes on one device, `render` makes the tables and
    `write` keeps them.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: bf16 where it is fast")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="default: cpu, and cuda if there is one")
    parser.add_argument("--rounds", type=int, help="default: 5 for the big models, 15 for the digits")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/results and the tables in README.md")
    options = parser.parse_args(arguments)
    if options.rounds is not None and not 1 <= options.rounds < 100:
        parser.error(f"expected 1 to 99 rounds, got --rounds {options.rounds}")
    whole = set(options.models) == set(MODELS) and options.precisions is None and options.devices is None
    if options.write and not whole:
        parser.error("--write needs the whole benchmark: leave out --models, --precisions and --devices")
    if absent := missing(PEERS):
        where = PEERS.relative_to(ROOT)
        print(f"Not installed in {where}: {', '.join(absent)}. `make bench` installs them.", file=sys.stderr)
        return 2

    result: dict[str, Any] = {"machine": machine.describe(), "models": {}, "cases": []}
    print(machine.sentence(result["machine"]), flush=True)
    if (load := os.getloadavg()[0]) > BUSY:
        print(
            f"Something else is running (load {load:.1f}): neither times nor ratios will be worth keeping.", flush=True
        )
    has_gpu = result["machine"]["gpu"] is not None
    devices = options.devices or (["cpu", "cuda"] if has_gpu else ["cpu"])
    if "cuda" in devices and not has_gpu:
        parser.error("--devices cuda: there is no CUDA device here")
    if options.precisions is None:
        options.precisions = ["fp32", "bf16"] if all(map(has_fast_bf16, devices)) else ["fp32"]
    try:
        for device in devices:
            for model in options.models if device == "cpu" else ["A64"]:
                benchmark(result, options, model, device)
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130
    except ContenderFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{render(result)}\n")
    if options.write:
        write(result)
    return 0
