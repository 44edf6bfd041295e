"""`DARKROOM_NPROC=2 dvc repro`: the same data, the same pictures to the eye, and a rank that dies costs nothing."""

import json
import os
import re
import signal
import subprocess
import time

import psutil
import pytest
from safetensors.torch import load_file

from tests.kills import left_behind
from tests.pipeline.project import DVC, STAGES, dvc, environment, make_reproduced, make_small, metrics, outcomes

TWO = {"DARKROOM_NPROC": "2"}


@pytest.fixture(scope="module")
def alone(warm, tmp_path_factory):
    return make_reproduced(tmp_path_factory.mktemp("alone") / "project")


def compare(root, alone):
    expected, found = (load_file(path / "models/ema.safetensors") for path in (alone, root))
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    a, b = metrics(root), metrics(alone)
    measured = {"extractor_weights": 0, "classifier": 0, "reference": 0}  # of other bits where threads are fewer
    assert a["protocol"] | measured == b["protocol"] | measured
    for group in ("unguided", "guided"):
        for key, tolerance in (("fid", {"rel": 0.05}), ("class_accuracy", {"abs": 0.1})):
            assert a[group][key]["value"] == pytest.approx(b[group][key]["value"], **tolerance)
    losses = [
        [row["loss"] for row in map(json.loads, (path / "reports/train/history.jsonl").open())]
        for path in (root, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.usefixtures("cold")  # ranks are processes that their launcher watches
@pytest.mark.soak  # their parts: tests/unit/training/test_ranks.py, test_distributed.py, evaluation/test_extraction.py
def test_two_ranks_make_a_model_of_equal_quality(alone, tmp_path):
    root = make_small(tmp_path / "project")
    assert outcomes(dvc(root, "repro", **TWO)) == dict.fromkeys(STAGES, "ran")
    compare(root, alone)
    assert outcomes(dvc(root, "repro")) == dict.fromkeys(STAGES, "skipped"), "ranks are no parameter"


@pytest.mark.usefixtures("cold")
@pytest.mark.soak  # of the training alone: tests/unit/training/test_ranks.py
def test_a_rank_that_dies_ends_the_stage_and_the_same_command_carries_on(alone, tmp_path):
    root = make_small(tmp_path / "project")
    running = subprocess.Popen(
        [*DVC, "repro"],
        cwd=root,
        env=environment(root, **TWO),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints, deadline = root / ".darkroom" / "checkpoints", time.monotonic() + 300
    while not list(checkpoints.glob("*/step-*.json")):
        assert running.poll() is None, "the pipeline ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first = psutil.Process(int(next(checkpoints.glob("*/lock")).read_text()))
    (second,) = (
        rank for rank in first.parent().children() if rank.pid != first.pid and "darkroom" in str(rank.cmdline())
    )
    os.kill(second.pid, signal.SIGKILL)
    _, err = running.communicate(timeout=120)
    assert running.returncode != 0
    assert re.search(r"train: rank 1 \(process \d+\) was killed by SIGKILL, so the others were ended", err)
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    assert "resuming at step" in dvc(root, "repro", **TWO)
    compare(root, alone)


@pytest.mark.usefixtures("cold")
@pytest.mark.soak  # of one process, with its shells: tests/unit/stages/test_following.py
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_save_and_end_when_dvc_alone_is_killed(tmp_path, number):
    root, log = make_small(tmp_path / "project", steps=4000), tmp_path / "log"

    def start():
        return subprocess.Popen(
            [*DVC, "repro", "train"],
            cwd=root,
            env=environment(root, **TWO),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    first = start()
    wait_for(lambda: list(root.glob(".darkroom/checkpoints/*/step-*.json")))
    first.send_signal(number)
    first.wait(60)
    assert left_behind(root) == []
    assert "saved" in log.read_text()
    second = start()
    wait_for(lambda: "resuming at step" in log.read_text())
    second.kill()
    second.wait(60)
    assert left_behind(root) == []
