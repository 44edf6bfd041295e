"""Stages on ranks, really started: a project with a script for a stage, and its processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

HEAD = """
import json, os, pathlib, signal, sys, threading, time
from darkroom.errors import InputError, Interrupted, StageFailed
import torch
from darkroom.stages.runner import main
from darkroom.training.distributed import *
"""


def project(root: Path, stage: str, before: str = "") -> Path:
    """A project whose stage `stage.py` has the body `stage`, with `ranks` joined, after the line `before`."""
    (root / "dvc.yaml").touch()
    (root / "params.yaml").touch()
    body = "".join(f"        {line}\n" for line in stage.strip().splitlines())
    joining = f'def run(workspace):\n    {before}\n    with joined(torch.device("cpu")) as ranks:\n'
    (root / "stage.py").write_text(f"{HEAD}{joining}{body}main(run, ranks=True)\n")
    return root


def start(root: Path, *command: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a stage, by default `stage.py` on two ranks; both outputs are pipes."""
    return subprocess.Popen(
        [sys.executable, *(command or ["stage.py"])],
        cwd=root,
        env=os.environ | {"DARKROOM_NPROC": "2", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a stage, once it and its ranks have ended."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(path: Path, seconds: float = 120) -> str:
    """The content of a file, once there is one."""
    deadline = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)
    return path.read_text()


def running(pid: int) -> bool:
    """Whether a process is there and not only waiting for its parent to ask how it ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
