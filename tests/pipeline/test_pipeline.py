"""The whole pipeline, small, through the real DVC: what is computed again, what is not, and what survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.project import DVC, STAGES, change, dvc, environment, make_reproduced, make_small, metrics, outcomes

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module")
def project(warm, tmp_path_factory) -> Path:
    return make_reproduced(tmp_path_factory.mktemp("pipeline") / "project")


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
        "models/average/choice.json",
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
    assert difference["guided.fid.value"]["new"] == after["guided"]["fid"]["value"]

    change(project, "sample", guidance_scale=2.0)
    back = outcomes(dvc(project, "repro"))
    assert {stage for stage, what in back.items() if what == "restored"} == {"sample", "evaluate"}
    assert metrics(project) == before
    assert (project / "dvc.lock").read_bytes() == lock


def test_auto_takes_the_average_with_the_lowest_fid_and_that_one_is_scored_and_registered(project):
    trained = json.loads((project / "models/model.json").read_text())["weights_digest"]
    change(project, "sample", ema="auto")
    said = dvc(project, "repro")
    assert {stage for stage, what in outcomes(said).items() if what == "ran"} == {"sample", "evaluate"}
    choice = json.loads((project / "models/average/choice.json").read_text())
    assert choice["chosen"] == min(choice["fid"], key=choice["fid"].get)
    assert {"trained", "0.050", "0.100"} <= set(choice["fid"])
    assert choice["seed"] not in (0, 1), "a seed that no score uses"
    assert f"sample.ema = auto: {choice['chosen']}, by the FID of 40 images" in said
    assert choice["chosen"] != "trained", "after 40 steps the average of the training is far behind"
    chosen = json.loads((project / "models/average/model.json").read_text())["weights_digest"]
    assert metrics(project)["weights_digest"] == chosen != trained
    darkroom, where = [sys.executable, "-m", "darkroom"], {"cwd": project, "env": environment(project)}
    subprocess.run([*darkroom, "register"], check=True, stdout=subprocess.DEVNULL, **where)
    status = subprocess.run([*darkroom, "status", "--json"], check=True, stdout=subprocess.PIPE, text=True, **where)
    assert json.loads(status.stdout)["challenger"]["weights"] == chosen

    change(project, "sample", ema="trained")
    assert outcomes(dvc(project, "repro"))["sample"] == "restored"
    assert metrics(project)["weights_digest"] == trained
    assert sorted(path.name for path in (project / "models/average").iterdir()) == ["choice.json"]


@pytest.mark.soak  # that the weights have the same bits is in test_kills
@pytest.mark.usefixtures("cold")
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
