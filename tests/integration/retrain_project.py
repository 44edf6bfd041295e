"""A project for retrainings in seconds: two stages under git and DVC, and a `darkroom` that answers as a test wants."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FIGURES = {
    "unguided.fid": 0.31,
    "unguided.fid_spread": 0.02,
    "floor.fid": 0.72,
    "unguided.class_accuracy": 0.97,
    "guided.class_accuracy": 0.999,
}
REFUSAL = "unguided.fid is 3.2: expected at most 2.5 (max_fid)"
STAGES: dict[str, tuple[str, dict[str, object]]] = {
    "first": ("open('a', 'w').write('1')", {"deps": ["first.py", "data/raw"], "params": ["train"], "outs": ["a"]}),
    "second": ("open('b', 'w').write(open('a').read())", {"deps": ["a"], "outs": ["b"]}),
}

# In the workspace's own src, which comes first for its commands. A list of answers is used up, the last one stays.
_DARKROOM = """
import json, os, pathlib, sys
path = pathlib.Path(os.environ["ANSWERS"]) / f"{sys.argv[1]}.json"
answers = json.loads(path.read_text())
answer = answers[0]
if len(answers) > 1:
    path.write_text(json.dumps(answers[1:]))
with (path.parent / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
print(answer.get("stderr", ""), file=sys.stderr)
if "stdout" in answer:
    print(json.dumps(answer["stdout"]))
sys.exit(answer.get("code", 0))
"""


class Answers:
    """What the project's `darkroom` answers, by command."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.say("params", {})
        self.say("register", {"stdout": registered()})
        self.say("promote", {"stdout": promotion(True, True, "2", "1", [])})
        self.say("status", {"stdout": {"champion": champion("1")}})

    def say(self, command: str, *answers: dict[str, Any]) -> None:
        (self.directory / f"{command}.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.is_file() else []


def registered(version: str = "2", created: bool = True) -> dict[str, Any]:
    return {"name": "digits", "version": version, "created": created, "run_id": "r" * 32, "lost_run": None}


def promotion(promoted: bool, changed: bool, version: str, previous: str | None, reasons: list[str]) -> dict[str, Any]:
    figures = {f"challenger.{key}": value for key, value in FIGURES.items()}
    if previous:
        figures |= {f"champion.{key}": value + 0.01 for key, value in FIGURES.items()}
    return {
        "promoted": promoted,
        "changed": changed,
        "version": version,
        "previous": previous,
        "reasons": reasons,
        "figures": figures | {"seconds_per_image": 0.02},
        "relation": "better",
    }


def champion(version: str) -> dict[str, Any]:
    return {"version": version, "weights": "ab" * 32, "figures": FIGURES}


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def make_ready(root: Path) -> Path:
    """Make a `dvc_project` of `STAGES` a whole one, committed."""
    shutil.copy(REPOSITORY / "params.yaml", root)
    for name, content in {
        "src/darkroom/__init__.py": "",
        "src/darkroom/__main__.py": _DARKROOM,
        "data/raw/.gitkeep": "",
        "models/model.json": json.dumps({"weights_digest": "ab" * 32}),
        ".gitignore": "/.darkroom/\n__pycache__/\n/data/raw/*\n!/data/raw/.gitkeep\n/a\n/b\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return root
