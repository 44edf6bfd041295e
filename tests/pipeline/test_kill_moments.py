"""Killed at the moments that file operations mark, the same command suffices and nothing is lost.

Every change kills twice in each of three kinds; `make soak` does a hundred and ends with their table.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import forks, kills
from tests.kills import Kind, Tally
from tests.pipeline.project import dvc as run_dvc
from tests.pipeline.project import environment, make_small
from tests.stack.running import make_project

pytestmark = [pytest.mark.kill, pytest.mark.timeout(3000)]

DVC = ("-P", "-m", "dvc", "repro")
STAGES = "darkroom.stages.{}"
SAVING = {"DARKROOM_CHECKPOINT_SECONDS": "1e9", "DARKROOM_CHECKPOINT_STEPS": "5"}
OUTPUTS = ("data/prepared/*", "data/samples/*", "reports/*.json", "reports/*.png", "models/*.*", "models/*/*")

PREPARE = Kind("prepare", (*DVC, "prepare"), STAGES.format("prepare"), r"/data/|/\.darkroom/prepare")
SAMPLE = Kind("sample", (*DVC, "sample"), STAGES.format("sample"), r"/data/|/reports/")
CHECKPOINT = Kind("a checkpoint's write", (*DVC, "train"), STAGES.format("train"), r"/checkpoints/.*step-")
OUTPUT = Kind("train's outputs", (*DVC, "train"), STAGES.format("train"), r"/models/|/reports/train/")
ALONE = tuple(
    Kind(f"DVC alone, {number}", (*DVC, "train"), STAGES.format("train"), r"/checkpoints/.*step-", number, "dvc")
    for number in ("SIGKILL", "SIGTERM")
)
# As flows run DVC; what plain `dvc repro` makes of a lock that was cut short is DVC's own matter.
LOCK = Kind(
    "DVC's lock write",
    (
        "-c",
        "import sys; from pathlib import Path; from flows.dvc_stage import run_stage\n"
        "for stage in ('prepare', 'validate'): run_stage(Path.cwd(), stage)",
    ),
    "dvc",
    r"/\.dvc/tmp/(rw)?lock$|/dvc\.lock$",
    mends=True,
)

# A stage, `register` or `promote` is at that file, and the flow is killed.
RETRAIN = Kind(
    "flows.retrain",
    ("-m", "flows.retrain"),
    r"darkroom(\..*)?",
    r"/(data|models|reports|checkpoints|artifacts|metrics)/|\.lock$",
    victim="flows.retrain",
)

_table: dict[str, Tally] = {}


@pytest.fixture(scope="module")
def before(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A project for a stage, in which everything before it is done."""
    place = tmp_path_factory.mktemp("before")
    earlier = {"train": ("prepare", "validate"), "sample": ("train", "train")}

    @cache
    def make(stage: str) -> Path:
        if stage not in earlier:
            return make_small(place / stage)
        start, last = earlier[stage]
        root: Path = shutil.copytree(make(start), place / stage, symlinks=True)
        run_dvc(root, "repro", last)
        return root

    return make


def go(kind: Kind, start: Path, place: Path, number: int, warm: bool = True) -> Tally:
    """Kill `number` times, each in a fresh copy of `start`, run the same command again and compare."""
    tally = _table.setdefault(kind.name, Tally())

    def fresh(name: str) -> tuple[Path, dict[str, str]]:
        root = place / name
        shutil.copytree(start, root, symlinks=True)
        env = environment(root, **SAVING, **(forks.environment() if warm else {}))
        if not warm:
            env.pop("TESTS_WARM", None)
        # `flows` comes from here, the stages' code from the project.
        env["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(Path(__file__).parents[2])])
        return root, env

    whole, env = fresh("whole")
    chosen = kills.moments(whole, kind, env, number)
    expected = left_by(whole)
    for count, moment in enumerate(chosen):
        root, env = fresh(f"killed-{count}")
        where = kills.kill(root, kind, env, moment)
        tally.kills += 1
        orphans = kills.left_behind(root)
        tally.orphans += len(orphans)
        code, said = kills.run(root, kind.command, env, None)
        tally.sufficed += code == 0
        found = left_by(root)
        differing = [name for name in expected | found if expected.get(name) != found.get(name)]
        tally.lost += len(differing)
        left = kills.half_made(root)
        if code or differing or orphans or left:
            tally.notes.append(f"{kind.name}, {where}: exit code {code}, {differing}, {orphans}, {left}\n{said[-800:]}")
        shutil.rmtree(root)
    return tally


def left_by(root: Path) -> dict[str, str]:
    return kills.state(root, *OUTPUTS) | kills.registry(root)


def judge(tally: Tally) -> None:
    assert (tally.lost, tally.orphans, tally.sufficed) == (0, 0, tally.kills), "\n".join(tally.notes)
    assert tally.notes == []


ONE = pytest.param(1, id="one")


def many(number: int) -> object:
    return pytest.param(number, id=str(number), marks=pytest.mark.soak)


@pytest.mark.parametrize("number", [many(10)])
def test_a_retraining_from_the_command_line(warm, tmp_path, number):
    judge(go(RETRAIN, make_project(tmp_path / "start"), tmp_path, number))


@pytest.fixture(autouse=True)
def shown(report):
    yield
    total = Tally()
    for tally in _table.values():
        for name in ("kills", "lost", "orphans", "sufficed"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    rows = [tally.row(name) for name, tally in _table.items()]
    report("kills at file operations", [kills.HEAD, *rows, total.row("all")])


@pytest.mark.parametrize("number", [many(15)])
def test_prepare(before, tmp_path, number):
    judge(go(PREPARE, before("prepare"), tmp_path, number))


@pytest.mark.parametrize("number", [many(15)])
def test_sample(before, tmp_path, number):
    judge(go(SAMPLE, before("sample"), tmp_path, number))


@pytest.mark.parametrize("number", [ONE, many(15)])
def test_a_checkpoint_s_write(before, tmp_path, number):
    judge(go(CHECKPOINT, before("train"), tmp_path, number))


@pytest.mark.parametrize("number", [many(10)])
def test_what_a_training_leaves(before, tmp_path, number):
    judge(go(OUTPUT, before("train"), tmp_path, number))


@pytest.mark.parametrize("number", [ONE, many(15)])
def test_dvc_s_own_locks(before, tmp_path, number):
    judge(go(LOCK, before("prepare"), tmp_path, number))


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.signal)
@pytest.mark.parametrize("number", [many(10)])
def test_dvc_alone_while_it_trains(before, tmp_path, kind, number):
    judge(go(kind, before("train"), tmp_path, number, warm=False))
