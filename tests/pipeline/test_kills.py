"""A training that is killed again and again, through `dvc repro`, ends with the bits of one that was left alone.

`pytest -m kill` runs this and prints what was killed where. Every change kills the trainer once and asks it to stop
once; `make soak` does it in each way at each kind of moment, twice.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from darkroom.files import digest_file
from tests.pipeline.project import DVC, change, environment, make_small

INTERVAL = 50
SEED = 20_261_124
SAVING = {"DARKROOM_CHECKPOINT_SECONDS": "1e9", "DARKROOM_CHECKPOINT_STEPS": str(INTERVAL)}
# Who gets which signal. The group is dvc and the stage: all that a machine's end would take with it.
HOW = (("trainer", signal.SIGKILL), ("trainer", signal.SIGTERM), ("group", signal.SIGKILL))
# When: any time from the start on, in the middle of training, or while a checkpoint is being written.
WHEN = ("training", "saving", "any time")


@dataclass
class Kill:
    """What one kill was, and what the run after it found."""

    who: str
    number: signal.Signals
    where: str
    reached: int  # the last step of the history
    resumed: int | None = None

    @property
    def lost(self) -> int:
        """Steps that the next run did again."""
        return self.reached - (self.resumed or 0)

    def __str__(self) -> str:
        then = f"went on at {self.resumed}, lost {max(0, self.lost)}" if self.resumed else "the next was killed sooner"
        return f"{self.number.name:<8} {self.who:<8} {self.where:<21} after step {self.reached:>4}; {then}"


class Training:
    """The train stage of a project under `dvc repro`."""

    def __init__(self, root: Path) -> None:
        self.log = root / "repro.log"
        self.checkpoints = root / ".darkroom" / "checkpoints"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*DVC, "repro", "train"],
                cwd=root,
                env=environment(root, **SAVING),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def reached(self) -> int:
        """The last step that the history tells of."""
        rows = [line for path in self.checkpoints.glob("*/history.jsonl") for line in path.read_text().splitlines()]
        return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)

    def resumed(self) -> int | None:
        found = re.search(r"resuming at step (\d+) of \d+", self.log.read_text())
        return int(found[1]) if found else None

    def writing(self) -> bool:
        return any(path.name.startswith(".step-") for path in self.checkpoints.glob("*/.*"))

    def trainer(self) -> int | None:
        """The process that holds the lock, once it does."""
        for lock in self.checkpoints.glob("*/lock"):
            text = lock.read_text()
            if text and Path(f"/proc/{text}").exists():
                return int(text)
        return None

    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, condition, seconds: float = 120, pause: float = 0.001) -> None:
        deadline = time.monotonic() + seconds
        while self.running() and not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(pause)

    def kill(self, who: str, number: signal.Signals) -> None:
        trainer = self.trainer()
        if who == "trainer" and trainer:
            os.kill(trainer, number)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(120)
        self.wait_until_gone(trainer)

    def wait_until_gone(self, trainer: int | None) -> None:
        while trainer and Path(f"/proc/{trainer}").exists():
            time.sleep(0.01)


def kill_once(root: Path, chance: random.Random, number: int, quota: int) -> Kill | None:
    """Start the training, kill it at some point; None if it had ended before."""
    who, what = HOW[number % len(HOW)]
    when = WHEN[(number // len(HOW)) % len(WHEN)]
    training = Training(root)
    if when == "any time":
        moment, limit = time.monotonic() + chance.uniform(0.1, 6.0), training.reached() + 2 * quota
        training.wait_for(lambda: time.monotonic() >= moment or training.reached() >= limit)
        where = "anywhere" if training.trainer() else "before training"
    else:
        training.wait_for(lambda: training.trainer() is not None)
        training.wait_for(lambda: "resuming" in training.log.read_text() or training.reached() > 0 or not number)
        target = training.reached() + chance.randint(1, quota)
        training.wait_for(lambda: training.reached() >= target)
        where = "training"
        if when == "saving":
            limit = training.reached() + 3 * INTERVAL  # a busy machine may look away during each of three writes
            training.wait_for(lambda: training.writing() or training.reached() >= limit, pause=0)
            where = "writing a checkpoint" if training.writing() else "training"
        else:
            time.sleep(chance.uniform(0, 0.05))
    if not training.running():
        return None
    if training.trainer() is None:
        who, what = "group", signal.SIGKILL
    training.kill(who, what)
    return Kill(who, what, where, training.reached())


@pytest.mark.kill
@pytest.mark.soak  # of the training alone, once: tests/unit/training/test_loop.py
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("number", "steps"), [(18, 1800)])
def test_a_training_killed_at_random_moments_ends_with_the_same_bits(tmp_path, report, number, steps):
    whole, killed = (make_small(tmp_path / name, steps=steps) for name in ("whole", "killed"))
    for root in (whole, killed):
        change(root, "train", batch_size=32)
        subprocess.run([*DVC, "repro", "-q", "validate"], cwd=root, env=environment(root), check=True)
    undisturbed = Training(whole)
    undisturbed.wait_for(lambda: False, 600)
    assert undisturbed.process.returncode == 0, undisturbed.log.read_text()

    chance, kills = random.Random(SEED), []
    while len(kills) < number:
        left = steps - (kills[-1].reached if kills else 0)
        kill = kill_once(killed, chance, len(kills), max(2, left // (number - len(kills) + 2)))
        assert kill is not None, f"the training ended after {len(kills)} kills"
        if kills:
            note_resumed(killed, kills[-1], kill)
        kills.append(kill)
    last = Training(killed)
    last.wait_for(lambda: False, 600)
    assert last.process.returncode == 0, last.log.read_text()
    kills[-1].resumed = last.resumed()

    digests = {
        name: (digest_file(whole / name), digest_file(killed / name))
        for name in ("models/ema.safetensors", "models/raw.safetensors", "models/run.json", "dvc.lock")
    }
    states = [next(root.glob(f".darkroom/checkpoints/*/step-{steps:09d}.safetensors")) for root in (whole, killed)]
    digests["optimizer, averages and all"] = (digest_file(states[0]), digest_file(states[1]))
    equal = [f"{name}: alone {alone[:16]}, killed {found[:16]}" for name, (alone, found) in digests.items()]
    report(f"{len(kills)} kills", [*map(str, kills), *equal])
    for name, (expected, found) in digests.items():
        assert found == expected, name
    for kill in kills:
        # An interval, and the steps made while a checkpoint was being written, which counts only when it is whole. The
        # next save waits for that, so it is less than two intervals whatever the disk does.
        assert kill.resumed is None or kill.lost < 2 * INTERVAL, kill
        if kill.number == signal.SIGTERM and kill.where in ("training", "writing a checkpoint"):
            assert kill.lost <= 0, kill
    assert {kill.number for kill in kills} == {signal.SIGKILL, signal.SIGTERM}
    assert sum(kill.where == "writing a checkpoint" for kill in kills) >= number // 4


def note_resumed(root: Path, kill: Kill, following: Kill) -> None:
    """Where the run after `kill` went on, if it came so far before it was killed itself."""
    found = re.search(r"resuming at step (\d+) of \d+", (root / "repro.log").read_text())
    if found and following.where != "before training":
        kill.resumed = int(found[1])
