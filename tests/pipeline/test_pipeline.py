"""The whole pipeline, small, through the real DVC: what is computed again, what is not, and what survives a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

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
    change(root, "sample", num_images=40, steps=4)
    change(root, "evaluate", kid_subsets=5, kid_subset_size=20)
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


def environment(root: Path) -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"PYTHONPATH": str(root / "src")}


def dvc(root: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*DVC, *arguments], cwd=root, env=environment(root), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = make_small(tmp_path_factory.mktemp("pipeline") / "project")
    assert outcomes(dvc(root, "repro")) == dict.fromkeys(STAGES, "ran")
    return root


def test_every_output_of_the_design_is_there(project):
    for name in (
        "data/prepared/dataset.json",
        "data/prepared/manifest.parquet",
        "data/prepared/train_images.npy",
        "reports/validation.json",
        "reports/validation.html",
        "models/extractor/extractor.json",
        "models/extractor/reference.json",
        "models/ema.safetensors",
        "models/raw.safetensors",
        "models/model.json",
        "models/run.json",
        "models/snapshots/snapshots.json",
        "reports/train/history.jsonl",
        "reports/train/metrics.jsonl",
        "reports/train/loss.csv",
        "data/samples/samples.json",
        "reports/samples.png",
        "reports/metrics.json",
    ):
        assert (project / name).stat().st_size > 0, name
    grid = Image.open(project / "reports" / "samples.png")
    assert grid.height > 500, "ten rows"
    assert grid.width > 200, "of four images"
    for name in ("history", "metrics"):
        rows = [json.loads(line) for line in (project / f"reports/train/{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 41))
        assert (
            all(row["images_per_second"] > 0 for row in rows)
            if name == "metrics"
            else "images_per_second" not in rows[0]
        )


def test_the_report_shows_what_its_numbers_mean(project):
    found = metrics(project)
    assert found["floor"]["num_images"] == 359
    assert found["protocol"]["num_images"] == 40
    scale = found["scale"]
    assert scale["noise_0_1"] < scale["noise_0_2"] < scale["noise_0_4"] < scale["pure_noise"]


def test_nothing_runs_twice_and_one_parameter_invalidates_only_what_it_shapes(project):
    assert outcomes(dvc(project, "repro")) == dict.fromkeys(STAGES, "skipped")
    subprocess.run(["git", "add", "dvc.lock"], cwd=project, check=True)
    subprocess.run(["git", "commit", "-qm", "reproduced"], cwd=project, check=True)
    lock, before = (project / "dvc.lock").read_bytes(), metrics(project)
    before_images = np.load(project / "data/samples/guided.npy")

    change(project, "sample", guidance_scale=3.0)
    changed = outcomes(dvc(project, "repro"))
    assert {stage for stage, what in changed.items() if what != "skipped"} == {"sample", "evaluate"}
    after = metrics(project)
    assert after["unguided"] == before["unguided"]
    assert after["protocol_digest"] != before["protocol_digest"]
    assert not np.array_equal(np.load(project / "data/samples/guided.npy"), before_images)
    difference = json.loads(dvc(project, "metrics", "diff", "--json"))["reports/metrics.json"]
    assert difference["guided.guidance_scale"] == {"old": 2.0, "new": 3.0, "diff": 1.0}
    assert difference["guided.fid"]["new"] == after["guided"]["fid"]

    change(project, "sample", guidance_scale=2.0)
    back = outcomes(dvc(project, "repro"))
    assert {stage for stage, what in back.items() if what == "restored"} == {"sample", "evaluate"}
    assert metrics(project) == before
    assert (project / "dvc.lock").read_bytes() == lock


def test_the_same_training_elsewhere_gives_the_same_lock(project, tmp_path):
    other = make_small(tmp_path / "elsewhere")
    dvc(other, "repro")
    assert (other / "dvc.lock").read_text() == (project / "dvc.lock").read_text()


def test_a_killed_trainer_resumes_and_the_final_metrics_are_those_of_an_uninterrupted_run(tmp_path):
    whole, killed = (make_small(tmp_path / name, steps=150) for name in ("whole", "killed"))
    dvc(whole, "repro")
    running = subprocess.Popen(
        [*DVC, "repro"], cwd=killed, env=environment(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints, deadline = killed / ".darkroom" / "checkpoints", time.monotonic() + 300
    while not list(checkpoints.glob("*/step-*.json")):
        assert running.poll() is None, "the pipeline ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    trainer = int(next(checkpoints.glob("*/lock")).read_text())
    os.kill(trainer, signal.SIGKILL)
    assert running.wait(60) != 0
    assert not (killed / "models" / "ema.safetensors").exists()

    output = dvc(killed, "repro")
    resumed = int(re.search(r"resuming at step (\d+) of 150", output)[1])
    assert 0 < resumed < 150
    assert metrics(killed) == metrics(whole)
    assert (killed / "models" / "ema.safetensors").read_bytes() == (whole / "models" / "ema.safetensors").read_bytes()
    assert (killed / "dvc.lock").read_text() == (whole / "dvc.lock").read_text()


def test_a_changed_parameter_never_resumes_the_checkpoint_of_another(project):
    change(project, "train", steps=45)
    output = dvc(project, "repro", "train")
    assert "resuming" not in output
    assert "trained 45 steps" in output
    change(project, "train", steps=40)
    assert outcomes(dvc(project, "repro", "train"))["train"] == "restored"


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("train", {"precision": "fp16"}, "train.precision = 'fp16': fp16 overflows"),
        ("sample", {"sampler": "dpmpp2m"}, 'did you mean "dpmpp_2m"?'),
        ("data", {"image_siez": 8}, 'data.image_siez = 8: unknown key; did you mean "image_size"?'),
    ],
)
def test_bad_parameters_stop_before_any_work_with_one_line(project, group, values, message):
    good = (project / "params.yaml").read_text()
    change(project, group, **values)
    try:
        stage = {"data": "prepare"}.get(group, group)
        done = subprocess.run(
            [sys.executable, "-m", f"darkroom.stages.{stage}"],
            cwd=project,
            env=environment(project),
            capture_output=True,
            text=True,
        )
    finally:
        (project / "params.yaml").write_text(good)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_weights_that_do_not_match_their_card_stop_sampling(project):
    path = project / "models" / "ema.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = subprocess.run(
        [sys.executable, "-m", "darkroom.stages.sample"],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
    )
    dvc(project, "checkout", "--force", "models/ema.safetensors")
    assert done.returncode == 2
    assert "sample: " in done.stderr
    assert "model.json says" in done.stderr
