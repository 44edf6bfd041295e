"""Everything that only a GPU can tell, in one run and one table: python -m benchmarks.gpu --out DIR

Each part runs in a process of its own with a limit of time, the most valuable first, and its figures are written before
the next one begins: what hangs or fails costs itself alone. `--rehearse` runs the same lines on a CPU at toy size.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import interleaved, machine
from benchmarks.contenders import REHEARSAL
from benchmarks.gpu_report import page
from benchmarks.interleaved import ROOT
from benchmarks.report import Result

RESULTS = interleaved.RESULTS / "gpu"
# Shares of the time, by value. What one leaves goes to those after it.
SHARES = {
    "tests": 0.16,
    "peak": 0.05,
    "training": 0.37,
    "sampling": 0.15,
    "saving": 0.06,
    "digits": 0.1,
    "photos": 0.11,
}
PART = [sys.executable, "-m", "benchmarks.gpu_parts"]
FINDING = 60.0  # seconds: a driver that hangs is one too
GRACE = 5.0  # seconds to end in good order
AMPERE = [8, 0]
TOO_OLD, NO_GPU = "computes no bf16, which began with Ampere (8.0)", "no GPU that torch can use"


def refusal(facts: Result) -> str | None:
    """Why nothing can be measured here, in a line that names the GPU; None if something can."""
    if facts["missing"]:
        return f"not installed: {', '.join(facts['missing'])}; --pack gathers what can travel (benchmarks/README.md)"
    if facts["gpu"] is None:
        known = f"NVIDIA driver {facts['driver']}" if facts["driver"] else "no NVIDIA driver"
        return f"{NO_GPU} ({known}, torch {facts['machine']['torch']}); --rehearse runs everything on the CPU"
    if facts["capability"] < AMPERE:
        return f"{facts['gpu']} (compute capability {'.'.join(map(str, facts['capability']))}) {TOO_OLD}"
    if facts["free"] < facts["memory"] / 2:
        sizes = f"{facts['free'] / 2**30:.1f} of {facts['memory'] / 2**30:.1f} GiB are free"
        return f"{facts['gpu']} is full: {sizes}; end what else runs there (nvidia-smi lists it)"
    return None


def run_part(name: str, setting: Result, environment: dict[str, str], limit: float) -> Result:
    """One part: {"seconds", "failure" (None if it went well), "result" (what it had written by then)}.

    Ctrl-C ends it, and comes out of here.
    """
    out = Path(setting["out"])
    path, log = out / f"{name}.json", out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [*PART, name, json.dumps(setting | {"seconds": limit})]
    started = time.monotonic()
    failure: str | None = "interrupted"
    with log.open("w") as said:
        popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = popen.wait(limit)
            failure = f"failed: {last_line(log)}" if code else None
        except subprocess.TimeoutExpired:
            failure = f"timed out after {limit:.0f} s"
        finally:
            end_session(popen)
            result = json.loads(path.read_text()) if path.is_file() else {}
            LAST.update({"seconds": time.monotonic() - started, "failure": failure, "result": result})
    return dict(LAST)


LAST: Result = {}  # of the part that ran last, an interrupted one too


def end_session(leader: "subprocess.Popen[Any]") -> None:
    """End a process and all that it started: first it is asked, then they are killed."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if leader.poll() is None:
            leader.terminate()
            leader.wait(GRACE)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(path.name)) == leader.pid:
                os.kill(int(path.name), signal.SIGKILL)
    leader.wait()


def last_line(log: Path) -> str:
    """The last line with something in it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


def environment_of(packed: Path | None, rehearsal: bool) -> dict[str, str]:
    """What parts and their contenders see: the packages of `packed` first."""
    environment = dict(os.environ) | {"DARKROOM_DEVICE": "cpu" if rehearsal else "cuda", "PYTHONUNBUFFERED": "1"}
    if packed:
        places = [str(packed / "site"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    environment.pop(REHEARSAL, None)
    return environment | ({REHEARSAL: "1", "OMP_NUM_THREADS": "1"} if rehearsal else {})


def write(out: Path, result: Result) -> None:
    """Put `gpu.json` and `gpu.md` in the place of what was there."""
    texts = {"gpu.json": json.dumps(result, indent=1, sort_keys=True) + "\n", "gpu.md": page(result, markdown=True)}
    for name, text in texts.items():
        temporary = out / f".{name}.new"
        temporary.write_text(text)
        temporary.replace(out / name)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(options: argparse.Namespace, out: Path, packed: Path | None) -> tuple[Result | None, int]:
    """Run the parts; the result, None if there is nothing to run them on, and the exit code."""
    environment = environment_of(packed, options.rehearse)
    setting = {"device": "cpu" if options.rehearse else "cuda", "out": str(out), "packed": packed and str(packed)}
    found = run_part("found", setting, environment, FINDING)
    facts = found["result"]
    if not facts:
        print(f"gpu: {found['failure']}", file=sys.stderr)
        return None, 2
    if options.rehearse:
        facts |= {"gpu": None, "rehearsal": True}
    if (why := refusal(facts)) and not (options.rehearse and not facts["missing"]):
        print(f"gpu: {why}", file=sys.stderr)
        return None, 2
    result: Result = {"rehearsal": options.rehearse, "minutes": options.minutes, "found": facts, "parts": {}}
    print(f"{machine.sentence(facts['machine'])}; {options.minutes:g} minutes, logs in {out}", flush=True)
    seconds, began, planned, code = 60 * options.minutes, time.monotonic(), 0.0, 0
    total = sum(SHARES[name] for name in options.parts)
    for name in options.parts:
        planned += seconds * SHARES[name] / total
        limit = planned - (time.monotonic() - began)
        print(f"{name}: up to {limit:.0f} s", flush=True)
        try:
            result["parts"][name] = part = run_part(name, setting, environment, max(limit, 1.0))
        except KeyboardInterrupt:
            result["parts"][name], code = dict(LAST), 130
            break
        finally:
            write(out, result)
        code = 1 if part["failure"] else code
        print(f"{name}: {part['failure'] or 'done'}, {part['seconds']:.0f} s", flush=True)
    write(out, result)
    return result, code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"), help="for figures, logs and pictures")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; default: 8")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="some of them only")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at toy size: no figure counts")
    parser.add_argument("--write", action="store_true", help="also keep the figures in benchmarks/results/gpu")
    parser.add_argument("--packed", type=Path, metavar="DIR", help="use what --pack left in DIR")
    parser.add_argument(
        "--pack", type=Path, metavar="DIR", help="gather in DIR what a bare GPU machine lacks, and stop"
    )
    parser.add_argument("--python", default="3.12", help="version of Python there, for --pack; default: 3.12")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= 600:
        parser.error(f"expected up to 600 minutes, got --minutes {options.minutes:g}")
    if options.packed and not options.packed.is_dir():
        parser.error(f"--packed {options.packed}: no such directory; --pack makes it")
    if options.write and (options.rehearse or options.parts != list(SHARES)):
        parser.error("--write needs the whole run on a GPU: leave out --rehearse and --parts")
    options.parts = [name for name in SHARES if name in options.parts]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table; returns the exit code: 1 if a part failed, 2 if there is nothing to measure on."""
    options = parse(arguments)
    if options.pack:
        from benchmarks.gpu_recipes import pack

        pack(options.pack, options.python)
        size = sum(path.stat().st_size for path in options.pack.rglob("*") if path.is_file())
        print(f"Packed {size / 2**20:.0f} MiB in {options.pack}.")
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with sigterm_as_ctrl_c():
        result, code = measure(options, out, options.packed and options.packed.resolve())
    if result is None:
        return code
    print(f"\n{page(result, markdown=False)}")
    if options.write and code != 130:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{machine.slug(result['found']['machine'])}.json"
        shutil.copy(out / "gpu.json", path)
        print(f"Wrote {path.relative_to(ROOT)}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
