"""The Makefile explains itself, and the container's build finds what it copies."""

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # `make test` would make this a sub-make, which says where it is
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *arguments], cwd=directory, env=environment, capture_output=True, text=True)


def test_make_alone_lists_every_target_with_a_line_of_help_and_there_are_at_most_fourteen() -> None:
    done = make(ROOT)
    assert done.returncode == 0, done.stderr
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert set(listed) | {"help"} == set(phony[1].split())
    assert len(phony[1].split()) <= 14


def test_a_python_that_is_too_old_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo "Python 3.9.2" || exit 1\n')
    old.chmod(0o755)
    done = make(tmp_path, "setup", f"PYTHON={old}")
    assert done.returncode == 2
    assert "expected Python 3.11 or later, found Python 3.9.2" in done.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


def test_the_lock_pins_every_line_exactly_and_names_no_build_of_one_machine() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert [line for line in lines if line.startswith(("nvidia", "cuda", "triton", "torchvision"))] == []


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for copy in copies if not copy.startswith("<<") for source in copy.split()}
    assert {"requirements.lock", "src"} <= sources
    assert [source for source in sources if not (ROOT / source).exists() or source in ignored] == []
