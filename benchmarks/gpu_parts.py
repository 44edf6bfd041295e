"""The parts of `benchmarks.gpu`, each in a process of its own: python -m benchmarks.gpu_parts NAME SETTING

A part is a generator: each thing that it yields is all that it knows so far, which is written before it goes on.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.contenders import PEERS, rehearse_if_asked
from benchmarks.interleaved import ROOT, ContenderFailed, running
from benchmarks.report import Result

PEERS_THERE = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}
NEEDED = ("torch", "numpy", "safetensors", "pydantic", "yaml", "torchmetrics", "rich", "pytest")
MODEL = "A64"
OWN = "darkroom"
# Compiled ones get ready together: that is work for the CPU. Then all run in turn.
TRAINED = (
    [(OWN, "fp32"), (OWN, "bf16"), ("darkroom, channels last", "bf16"), ("denoising-diffusion-pytorch", "bf16")],
    [(f"{OWN} compiled", "bf16"), (f"{OWN} compiled, channels last", "bf16"), ("diffusers compiled", "bf16")],
)
SAMPLED = (
    [(OWN, "bf16"), ("plain UNet", "bf16"), ("diffusers", "bf16")],
    [(f"{OWN} compiled", "bf16"), ("diffusers compiled", "bf16")],
)
IN_A_REHEARSAL = {
    "benchmarks.trainers": (TRAINED[0][0], *TRAINED[1][1:]),
    "benchmarks.contenders": (SAMPLED[0][0], SAMPLED[1][1]),
}
BATCH_SIZES, SAMPLING_STEPS, ROUNDS = (8, 64, 256), 20, 3


@dataclass(frozen=True)
class Setting:
    """What a part is told; plain JSON but for the paths."""

    device: str  # cuda, or cpu in a rehearsal
    out: Path  # where it may leave files
    seconds: float  # that it has
    packed: Path | None = None  # of `gpu_data.pack`

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


def found(setting: Setting) -> Iterator[Result]:
    """What is there: the GPU with its memory and driver, and packages that are missing."""
    needed = [name for name in NEEDED if find_spec(name) is None]
    facts: Result = {"missing": needed, "peers_missing": peers_missing(), "driver": driver(), "gpu": None}
    if "torch" in needed:
        yield facts
        return
    import torch

    facts["machine"] = machine.describe()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        facts |= {"free": free, "memory": total, "cuda": torch.version.cuda}
    yield facts


def peers_missing() -> list[str]:
    """The peers that are not installed here."""
    return [name for name, module in PEERS_THERE.items() if not (find_spec(module) or (PEERS / module).is_dir())]


def driver() -> str | None:
    """The version of NVIDIA's kernel driver; None without one."""
    with contextlib.suppress(OSError):
        match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.split()
        return lines[0] if lines else None
    return None


def tests(setting: Setting) -> Iterator[Result]:
    """`pytest -m gpu`: what passed and what did not."""
    sources = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    files = [path for path, text in sources.items() if "pytest.mark.gpu" in text and "DARKROOM_REHEARSAL" not in text]
    report = setting.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if setting.rehearsal:
        command += ["-k", "not wide and not fp32"]
    environment = os.environ | {"DARKROOM_TEST_DEVICE": setting.device}
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, env=environment, check=False)
    cases: Result = {}
    for case in ET.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        cases[name] = f"{bad[0].tag}: {(bad[0].get('message') or '').splitlines()[:1]}" if bad else "passed"
    yield {"exit_code": done.returncode, "cases": cases}


def peak(setting: Setting) -> Iterator[Result]:
    """What the device can do: large matrix products in bf16, and copies in its memory (bytes read and written)."""
    import torch

    side, size = (8192, 2**31) if setting.device == "cuda" else (256, 2**22)
    a = torch.randn(side, side, device=setting.device, dtype=torch.bfloat16)
    b = torch.empty(size, dtype=torch.uint8, device=setting.device)
    c = torch.empty_like(b)
    products = timed(lambda: a @ a, setting.device)
    copies = timed(lambda: c.copy_(b), setting.device)
    yield {"matrix_flops": 2 * side**3 / products, "side": side, "copy_bytes": 2 * size / copies, "copied": size}


def timed(work: Callable[[], Any], device: str, repeats: int = 20, rounds: int = 3) -> float:
    """Seconds of one call, the best of some rounds."""
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        times.append((time.perf_counter() - started) / repeats)
    return min(times[1:])


def synchronize(device: str) -> None:
    """Return when the device has nothing to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def training(setting: Setting) -> Iterator[Result]:
    """A64 in its variants, and its losses beside those of eager fp32, on the same images and noise."""
    from benchmarks.trainers import size_of

    size = size_of(MODEL, setting.device)
    result: Result = {"model": MODEL, "batch_size": size.batch_size, "steps": size.steps, "contenders": {}}
    yield from contest(result, "benchmarks.trainers", TRAINED, setting, [(size.batch_size, size.steps)])


def sampling(setting: Setting) -> Iterator[Result]:
    """A64 from noise to uint8 images."""
    sizes = (1, 2) if setting.rehearsal else BATCH_SIZES
    steps = 2 if setting.rehearsal else SAMPLING_STEPS
    result: Result = {"model": MODEL, "steps": steps, "contenders": {}}
    yield from contest(result, "benchmarks.contenders", SAMPLED, setting, [(size, steps) for size in sizes])


def contest(
    result: Result,
    module: str,
    groups: Sequence[Sequence[tuple[str, str]]],
    setting: Setting,
    tasks: Sequence[tuple[int, int]],
) -> Iterator[Result]:
    """Run each group's contenders in turn at each task, (batch size, steps); one that fails costs itself alone."""
    contenders, absent = result["contenders"], tuple(peers_missing())
    for group in groups:
        group = [contender for contender in group if not (absent and contender[0].startswith(absent))]
        if setting.rehearsal:
            group = [contender for contender in group if contender in IN_A_REHEARSAL[module]]
        with contextlib.ExitStack() as stack:
            alive = {}
            for name, precision in group:
                command = [sys.executable, "-m", module, name, MODEL, precision, setting.device]
                alive[f"{name} {precision}"] = stack.enter_context(running(name, command))

            def attempt(name: str, ask: Callable[[], Any]) -> Any:
                try:
                    return ask()
                except ContenderFailed as error:
                    contenders.setdefault(name, {})["failure"] = str(error).strip().splitlines()[-1]
                    return None

            for name, process in list(alive.items()):
                if (said := attempt(name, process.answer)) is None:
                    del alive[name]
                else:
                    contenders[name] = {"network": said, "batches": {}}
            for batch_size, steps in tasks:
                asks = {
                    name: partial(process.ask, batch_size=batch_size, steps=steps) for name, process in alive.items()
                }
                with ThreadPoolExecutor() as pool:  # what compiles does so beside the others; none of it counts
                    first = dict(zip(asks, pool.map(attempt, asks, asks.values()), strict=True))
                alive = {name: process for name, process in alive.items() if first[name] is not None}
                runs: dict[str, list[Any]] = {name: [] for name in alive}
                for turn in range(1 if setting.rehearsal else ROUNDS):
                    for name in list(alive)[:: 1 if turn % 2 == 0 else -1]:
                        runs[name].append(attempt(name, asks[name]))
                for name, answers in runs.items():
                    if None not in answers:
                        contenders[name]["batches"][str(batch_size)] = _summary(first[name], answers, batch_size, steps)
                yield result


def _summary(first: Result, answers: list[Result], batch_size: int, steps: int) -> Result:
    seconds = median(answer["seconds"] for answer in answers)
    found = {"seconds": [answer["seconds"] for answer in answers], "images_per_second": batch_size * steps / seconds}
    found |= {"memory": max(answer["memory"] for answer in answers)} if "memory" in first else {}
    if "losses" in first:
        found["losses"] = [loss for answer in (first, *answers) for loss in answer["losses"]]
    return found


def saving(setting: Setting) -> Iterator[Result]:
    """What a checkpoint of A64 costs its training."""
    from benchmarks.saving import EVERY, INTERVAL, measure

    if setting.rehearsal:
        EVERY[MODEL] = 3
    yield {"model": MODEL, "interval": INTERVAL, **measure(MODEL, setting.device)}


def digits(setting: Setting) -> Iterator[Result]:
    """The recipe `digits` from its first step to its FID."""
    from benchmarks.gpu_recipes import run

    yield from run("digits", setting)


def photos(setting: Setting) -> Iterator[Result]:
    """The recipe `photos`, for as many steps as fit into half of the time that is left."""
    from benchmarks.gpu_recipes import run

    yield from run("photos", setting, share=0.5)


PARTS = {part.__name__: part for part in (found, tests, peak, training, sampling, saving, digits, photos)}


def main(name: str, setting: str) -> None:
    """Run one part, and write what it yields to `NAME.json`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # contenders end with their block
    told = json.loads(setting)
    told |= {"out": Path(told["out"]), "packed": Path(told["packed"]) if told["packed"] else None}
    setting_ = Setting(**told)
    if find_spec("torch"):
        import torch

        rehearse_if_asked()
        torch.manual_seed(0)
    path = setting_.out / f"{name}.json"
    for result in PARTS[name](setting_):
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(result, indent=1, sort_keys=True))
        temporary.replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
