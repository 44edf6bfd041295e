"""The gate with real scores of the default recipe: what is worse is refused, and noise is never taken for progress.

Runs the recipe once (some minutes). The noisy copies are scored with 500 images and 10 steps for each of five seeds.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom.diffusion.model import DiffusionModel
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.evaluation.rescore import score_model
from darkroom.files import digest_file, read_json, write_json
from darkroom.params import load_params
from darkroom.registry.gate import Evidence, decide
from darkroom.workspace import Workspace
from tests.pipeline.project import REPOSITORY, dvc, environment, make_small

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SOUND = Evidence(validated=True, seconds_per_image=0.1)
TRIES = 20
COARSE = {"num_images": 500, "steps": 10}  # twenty scores of the full protocol would take an hour


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = make_small(tmp_path_factory.mktemp("soak") / "project")
    shutil.copy(REPOSITORY / "params.yaml", root / "params.yaml")
    dvc(root, "repro")
    return Workspace(root)


def score(project: Workspace, models: Path, **sample: int) -> ScoreRecord:
    params = load_params(project.params_file)
    settings = params.sample.model_copy(update=sample)
    return score_model(DiffusionModel.load(models), project.extractor, settings, params.evaluate)


def test_the_average_at_half_the_training_never_replaces_that_of_all(project: Workspace, tmp_path: Path) -> None:
    champion = ScoreRecord.read(project.metrics_file)
    policy = load_params(project.params_file).registry.gate
    command = [
        sys.executable,
        "-m",
        "darkroom",
        "ema",
        "--width",
        "0.05",
        "--step",
        "700",
        "--output",
        str(tmp_path / "half"),
    ]
    subprocess.run(command, cwd=project.root, env=environment(project.root), check=True)
    verdict = decide(policy, score(project, tmp_path / "half"), champion, SOUND)
    print(verdict.reasons)
    assert (verdict.passed, verdict.relation) == (False, "worse")
    assert any("champion's FID + margin" in reason for reason in verdict.reasons)


def test_a_copy_with_one_percent_noise_in_its_weights_is_never_better(project: Workspace, tmp_path: Path) -> None:
    policy = load_params(project.params_file).registry.gate
    champion = score(project, project.models, **COARSE)
    relations = []
    for attempt in range(TRIES):
        copy = with_noise(project.models, tmp_path / str(attempt), attempt)
        record = score(project, copy, **COARSE)
        relations.append(decide(policy, record, champion, SOUND).relation)
        print(attempt, record.unguided.fid.value, champion.unguided.fid.value, relations[-1])
    assert set(relations) <= {"tied", "worse"}


def with_noise(models: Path, copy: Path, seed: int) -> Path:
    """The model with every weight off by a normal 1 % of itself."""
    copy.mkdir()
    torch.manual_seed(seed)
    tensors = load_file(models / "ema.safetensors")
    noisy = {
        name: tensor * (1 + 0.01 * torch.randn_like(tensor)) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file(noisy, copy / "ema.safetensors")
    card = read_json(models / "model.json") | {"weights_digest": digest_file(copy / "ema.safetensors")}
    write_json(copy / "model.json", card)
    return copy
