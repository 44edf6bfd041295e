"""Stages and commands on a file system that is full: one line, exit code 1, and the same command ends well after it.

The project lies on a small file system in memory, which takes a user namespace; where there is none, this is skipped.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.project import environment, make_reproduced

# In a namespace of its own: a file system that holds the project at its own path, is filled until so many kilobytes are
# left, and gets room after the command.
_SCRIPT = """
set -e
mount -t tmpfs -o size=64m none "$1"; cp -a "$2/." "$1"; mount --bind "$1" "$2"; cd "$2"; margin=$3; shift 3
avail=$(df --output=avail -k . | tail -n 1)
head -c $(((avail - margin) * 1024)) /dev/zero > .filler
code=0; "$@" || code=$?
rm .filler
echo "left: $(find . -name '*.tmp' | wc -l)"
again=0; "$@" > again 2>&1 || again=$?
echo "ended: $code $again"
"""
_ALONE = ("unshare", "-rm")


def _has_namespaces() -> bool:
    command = [*_ALONE, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return sys.platform == "linux" and shutil.which("unshare") is not None and not subprocess.run(command).returncode


pytestmark = [
    pytest.mark.skipif(not _has_namespaces(), reason="no user namespaces here"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def project(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_reproduced(tmp_path_factory.mktemp("full") / "project")
    shutil.rmtree(root / ".dvc" / "cache")
    return root


def run_full(project: Path, place: Path, margin: int, *command: str) -> tuple[list[str], int, int, int]:
    """What the command printed at its end, its exit code, that of the same command with room, and what was left."""
    place.mkdir()
    done = subprocess.run(
        [*_ALONE, "bash", "-c", _SCRIPT, "full", str(place), str(project), str(margin), sys.executable, "-m", *command],
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    *lines, left, ended = done.stdout.splitlines()
    code, again = map(int, ended.removeprefix("ended: ").split())
    return lines, code, again, int(left.removeprefix("left: "))


soak = pytest.mark.soak


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize(
    ("margin", "command", "names"),
    [
        (16, ["darkroom.stages.reference"], "models/extractor"),
        (100, ["darkroom", "register"], "mlflow.db"),
        pytest.param(16, ["darkroom.stages.sample"], "data/samples", marks=soak),
        pytest.param(16, ["darkroom.stages.prepare"], "prepare", marks=soak),
        pytest.param(16, ["darkroom.stages.validate"], "reports", marks=soak),
        pytest.param(16, ["darkroom.stages.train"], "checkpoints", marks=soak),
        pytest.param(0, ["darkroom", "register"], "mlflow.db", marks=soak),
        pytest.param(0, ["darkroom", "sample"], "samples", marks=soak),
        pytest.param(0, ["darkroom", "ema", "--width", "0.08"], "ema-0.080", marks=soak),
        pytest.param(0, ["darkroom", "data", "accept", "--reason", "x"], "accepted.json", marks=soak),
    ],
)
def test_a_full_disk_is_one_line_and_with_room_the_same_command_ends_well(project, tmp_path, margin, command, names):
    lines, code, again, left = run_full(project, tmp_path / "place", margin, *command)
    assert code == 1, lines
    said = [line for line in lines if line.startswith(("darkroom: ", f"{command[0].rpartition('.')[2]}: "))]
    assert lines[-1:] == said, lines
    assert names in said[0]
    assert "No space left" in said[0] or "is full" in said[0] or "GB free" in said[0]
    assert not any("Traceback" in line for line in lines)
    assert (left, again) == (0, 0)
