"""A small project under git and the real DVC with a registered model, its remote on S3: what checkouts start from."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from darkroom.files import write_json, write_text
from darkroom.workspace import Workspace
from tests import forks
from tests.integration.registry_project import CLASSES, REPOSITORY, make_project, write_model, write_score

# No stage can run: whatever has nothing to do did not need to.
STAGES = {
    "prepare": {
        "cmd": "exit 1",
        "params": ["data"],
        "deps": ["data/raw", "src/darkroom/data"],
        "outs": ["data/prepared"],
    },
    "validate": {"cmd": "exit 1", "deps": ["data/prepared", "expectations"], "outs": ["reports/validation.json"]},
    "train": {
        "cmd": "exit 1",
        "params": ["train"],
        "deps": ["data/prepared", "src/darkroom/train.py"],
        "outs": ["models/ema.safetensors", "models/model.json", "models/run.json", "reports/train/history.jsonl"],
    },
    "evaluate": {
        "cmd": "exit 1",
        "params": ["evaluate", "sample"],
        "deps": ["models/ema.safetensors", "scripts/draw.py"],
        "metrics": ["reports/metrics.json"],
    },
}
OUTPUTS = 7
SECRET = "a-secret-of-this-machine"


def git(root: Path, *arguments: str) -> str:
    return run(root, "git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.org", *arguments)


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-P", "-m", "dvc", *arguments)


def run(root: Path, *command: str) -> str:
    done = forks.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_tracked(root: Path, remote: str) -> Workspace:
    """A committed project whose outputs DVC has in its cache; the remote is known to this machine alone."""
    project = make_project(root)
    for name, content in {
        "src/darkroom/data/packing.py": "pack = 1\n",
        "src/darkroom/train.py": "train = 1\n",
        "src/darkroom/registry.py": "no stage depends on this\n",
        "scripts/draw.py": "draw = 1\n",
        "expectations/images.json": "{}\n",
        "flows/retrain.py": "flow = 1\n",
        "docs/index.md": "no part of a version\n",
        "data/raw/.gitkeep": "",
        "data/raw/images/1.txt": "an image\n",
        ".gitignore": "/.darkroom/\n",
        "dvc.yaml": yaml.safe_dump({"stages": STAGES}, sort_keys=False),
    }.items():
        write_text(root / name, content)
    (root / ".dvcignore").write_bytes((REPOSITORY / ".dvcignore").read_bytes())
    write_model(project, 1)
    write_score(project)
    digest = "d" * 64
    splits = {"train": 1438, "test": 359}
    info = {"name": "digits", "image_size": 8, "channels": 1, "classes": CLASSES, "splits": splits, "digest": digest}
    write_json(project.prepared / "dataset.json", info)
    write_json(project.reports / "validation.json", {"success": True, "dataset": digest})
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "remote", "add", "--local", "--default", "storage", remote)
    for key in ("access_key_id", "secret_access_key"):
        dvc(root, "remote", "modify", "--local", "storage", key, SECRET)
    dvc(root, "add", "-q", "data/raw/images")
    dvc(root, "commit", "-q", "-f")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return project


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below `root`, without the insides of git and DVC."""
    return {
        os.path.relpath(path, root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not {".git", ".dvc", ".darkroom"} & set(path.relative_to(root).parts)
    }
