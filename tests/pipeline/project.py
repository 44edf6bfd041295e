"""A project with the real pipeline and parameters that take seconds, and the commands that run it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
STAGES = ["prepare", "validate", "reference", "train", "sample", "evaluate"]


def make_small(root: Path, steps: int = 40) -> Path:
    """A project with this pipeline and parameters that take seconds."""
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
    change(root, "train", steps=steps, batch_size=16, precision="fp32", lr_warmup_steps=0)
    change(root, "reference", steps=150, channels=[8, 16], features=16, min_accuracy=0.5, batch_size=64)
    change(root, "sample", num_images=40, steps=4, seeds=[0, 1])
    change(root, "evaluate", kid_subsets=5, kid_subset_size=20, bootstrap=20)
    for command in (
        ["git", "init", "-q"],
        [*DVC, "init", "-q"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "start"],
    ):
        subprocess.run(command, cwd=root, check=True)
    return root


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
    return os.environ | ENVIRONMENT | {"PYTHONPATH": str(root / "src")} | extra


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
