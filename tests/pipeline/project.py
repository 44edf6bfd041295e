"""A project with the real pipeline and parameters that take seconds, and the commands that run it."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
STAGES = ["prepare", "validate", "reference", "train", "sample", "evaluate"]
STEPS = 40  # of a small training


def make_small(root: Path, steps: int = 40) -> Path:
    """A project with this pipeline and parameters that take seconds, and a database for MLflow."""
    shutil.copytree(_shared("small", _make), root, symlinks=True)
    if steps != STEPS:
        change(root, "train", steps=steps)
        subprocess.run(["git", "commit", "-qam", "another length"], cwd=root, check=True)
    return root


def make_reproduced(root: Path) -> Path:
    """The same after `dvc repro` and a commit of its lock: made once for all tests of a run, and copied."""
    made = _shared("reproduced", _reproduce)
    shutil.copytree(made, root, symlinks=True)
    with contextlib.closing(sqlite3.connect(root / ".darkroom" / "mlflow.db")) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(made), str(root)))
    return root


def _shared(name: str, make: Callable[[Path], None]) -> Path:
    """A directory that the first process to ask makes for all processes of the run."""
    shared = Path(os.environ["TESTS_SHARED"])
    with FileLock(shared / f"{name}.lock"):
        if not (shared / f"{name}.made").exists():
            shutil.rmtree(shared / name, ignore_errors=True)
            make(shared / name)
            (shared / f"{name}.made").touch()
    return shared / name


def _make(root: Path) -> None:
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml", "expectations", "src", ".gitignore", ".dvcignore"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, root / name)
    for name in ("data/raw", "models"):
        (root / name).mkdir(parents=True)
        (root / name / ".gitkeep").touch()
    change(root, "train.model", channels=[16, 16], num_res_blocks=1, norm_groups=8, head_channels=8)
    change(root, "train", steps=STEPS, batch_size=16, precision="fp32", lr_warmup_steps=0)
    change(root, "reference", steps=150, channels=[8, 16], features=16, min_accuracy=0.5, batch_size=64)
    change(root, "sample", num_images=40, steps=4, seeds=[0, 1])
    change(root, "evaluate", kid_subsets=5, kid_subset_size=20)
    for command in (
        ["git", "init", "-q"],
        [*DVC, "init", "-q"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "start"],
        [sys.executable, "-m", "darkroom", "status", "--json"],  # MLflow's database: making one takes six seconds
    ):
        subprocess.run(command, cwd=root, env=environment(root), check=True, stdout=subprocess.DEVNULL)


def _reproduce(root: Path) -> None:
    make_small(root)
    dvc(root, "repro")
    for command in (["git", "add", "-A"], ["git", "commit", "-qm", "reproduced"]):
        subprocess.run(command, cwd=root, check=True)


def change(root: Path, group: str, **values: object) -> None:
    content = yaml.safe_load((root / "params.yaml").read_text())
    place = content
    for part in group.split("."):
        place = place[part]
    place |= values
    (root / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


DVC = [sys.executable, "-P", "-m", "dvc"]
ENVIRONMENT = {"DARKROOM_CHECKPOINT_SECONDS": "0.2"}


def environment(root: Path, **extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | ENVIRONMENT | {"PYTHONPATH": path} | extra


def dvc(root: Path, *arguments: str, code: int = 0, **extra: str) -> str:
    done = subprocess.run(
        [*DVC, *arguments],
        cwd=root,
        env=environment(root, **extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def outcomes(output: str) -> dict[str, str]:
    """Stage -> ran, cached or restored."""
    patterns = {
        "ran": r"Running stage '(\w+)'",
        "skipped": r"Stage '(\w+)' didn't change, skipping",
        "restored": r"Stage '(\w+)' is cached - skipping run",
    }
    return {stage: name for name, pattern in patterns.items() for stage in re.findall(pattern, output)}


def metrics(root: Path) -> dict:
    return json.loads((root / "reports" / "metrics.json").read_text())
