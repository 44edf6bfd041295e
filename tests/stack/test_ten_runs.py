"""Ten runs in a row on one stack, with kills at random: nothing leaks, nothing grows, the registry is consistent."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stack.running import Stack
from tests.stack.test_faults import aliases, retrain, vanish

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SEED = 20_261_127
RUNS = 10
# What is killed, after the run has begun; None lets it be.
KILLS = ("worker", "mlflow", "trainer", "run", "machine", None)


def size(directory: Path) -> int:
    """Bytes of the files below, each inode once: workspaces share theirs with the cache."""
    inodes = {}
    for path in directory.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        inodes[status.st_ino] = status.st_size
    return sum(inodes.values())


def entries(directory: Path) -> int:
    return len(list(directory.iterdir())) if directory.exists() else 0


def strike(stack: Stack, what: str) -> None:
    if what in ("worker", "mlflow"):
        stack.kill(what)
    elif what == "machine":
        vanish(stack)
    else:
        for process in stack.running("darkroom.stages" if what == "trainer" else "prefect.engine"):
            process.kill()


def test_ten_runs_with_kills_at_random_leave_no_trace(stack: Stack, report: Callable[[str, list[str]], None]) -> None:
    chance = random.Random(SEED)
    state = stack.root / ".darkroom"
    lines = []
    for number in range(RUNS):
        began = time.monotonic()
        run = retrain(stack, **{"train.seed": 100 + number, "train.steps": 200})
        stack.wait(run, "Running", timeout=300)
        what = chance.choice(KILLS)
        if what is not None:
            time.sleep(chance.uniform(0, 45))
            strike(stack, what)
        ended = stack.wait(run, timeout=600)
        stack.until(stack.is_well, 180, "the stack to be well")
        stack.until(lambda: not stack.running("darkroom."), 60, "every process of the run to be gone")
        stack.until(lambda: not stack.taken_slots(), 180, "every slot to be free")
        kept, trainings = entries(state / "workspaces"), entries(state / "checkpoints")
        lines.append(
            f"{number + 1:>2}  {what or 'none':<8} {ended.name:<12} {time.monotonic() - began:6.1f} s"
            f"  {kept} workspaces, {trainings} trainings, {size(state) / 1e6:.0f} MB"
        )
        report("ten runs", lines)
        print(lines[-1], flush=True)
        assert kept <= 3
        assert trainings <= 4  # of the newest three and of the one that was killed
    last = retrain(stack, **{"train.seed": 999})
    assert stack.wait(last, timeout=300).name == "Promoted", "\n".join(stack.logs(last))
    champion = aliases(stack)["champion"]
    version = stack.mlflow().get_model_version("digits", champion)
    assert version.tags["darkroom.verdict"] == "passed"
    names = {model.name for model in stack.mlflow().search_registered_models()}
    assert names == {"digits"}  # no lock is left
