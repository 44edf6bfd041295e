"""DVC's cache on S3: what one clone pushes, another gets without computing anything again."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml

from flows.dvc_stage import run_stage
from tests import forks
from tests.s3 import server

BUCKET = "darkroom"


def run(directory: Path, *command: str) -> str:
    done = forks.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-P", "-m", "dvc", *arguments)


STAGES = {
    "pack": {"cmd": "python pack.py", "deps": ["pack.py"], "outs": ["packed"]},
    "count": {"cmd": "python count.py", "deps": ["packed", "count.py"], "metrics": ["count.json"]},
}
SOURCES = {
    "pack": "open('packed', 'wb').write(bytes(range(256)) * 4000)",
    "count": "import json, os; json.dump({'bytes': os.path.getsize('packed')}, open('count.json', 'w'))",
}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A committed project of two stages whose outputs and run cache are on S3; only AWS_ENDPOINT_URL points to it."""
    root = tmp_path_factory.mktemp("pushed") / "project"
    root.mkdir()
    with server() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        (root / "params.yaml").write_text("{}\n")
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
        for name, source in SOURCES.items():
            (root / f"{name}.py").write_text(source)
        run(root, "git", "init", "-q")
        dvc(root, "init", "-q")
        dvc(root, "remote", "add", "--default", "s3", f"s3://{BUCKET}/cache")
        dvc(root, "repro")
        run(root, "git", "add", "--all")
        run(root, "git", "commit", "-q", "-m", "pipeline")
        dvc(root, "push", "--run-cache")
        yield root


def clone(source: Path, target: Path) -> Path:
    run(source.parent, "git", "clone", "-q", os.fspath(source), os.fspath(target))
    return target


def test_a_fresh_clone_pulls_the_same_bytes_and_has_nothing_to_do(pushed: Path, tmp_path: Path) -> None:
    fresh = clone(pushed, tmp_path / "fresh")
    assert not (fresh / "packed").exists()
    dvc(fresh, "pull")
    assert (fresh / "packed").read_bytes() == (pushed / "packed").read_bytes()
    assert [run_stage(fresh, stage).name for stage in ("pack", "count")] == ["Cached", "Cached"]


def test_a_fresh_clone_computes_a_changed_stage_with_what_it_needs_and_no_more(pushed: Path, tmp_path: Path) -> None:
    fresh = clone(pushed, tmp_path / "fresh")
    source = (fresh / "count.py").read_text()
    (fresh / "count.py").write_text(source.replace("'bytes'", "'size'"))
    output = dvc(fresh, "repro", "--pull", "--allow-missing")
    assert "Running stage 'count'" in output
    assert "Running stage 'pack'" not in output
    assert (fresh / "count.json").read_text() == '{"size": 1024000}'


def test_results_of_an_earlier_variation_come_from_the_remote_run_cache(pushed: Path, tmp_path: Path) -> None:
    committed = (pushed / "count.json").read_text()
    source = (pushed / "count.py").read_text()
    varied = source.replace("'bytes'", "'number'")
    (pushed / "count.py").write_text(varied)
    assert run_stage(pushed, "count").name == "Ran"
    dvc(pushed, "push", "--run-cache")

    fresh = clone(pushed, tmp_path / "fresh")
    dvc(fresh, "pull", "--run-cache")
    assert (fresh / "count.json").read_text() == committed
    (fresh / "count.py").write_text(varied)
    assert "Stage 'count' is cached - skipping run" in dvc(fresh, "repro", "--pull")
    assert (fresh / "count.json").read_text() == '{"number": 1024000}'
