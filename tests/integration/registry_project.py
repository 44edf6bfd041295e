"""A small project as the pipeline leaves it, with a real network of random weights: what registration starts from."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import save_file

from darkroom.diffusion.card import CARD_FILE, WEIGHTS_FILE, ModelCard, build_unet
from darkroom.evaluation.code import code_digest
from darkroom.evaluation.protocol import Estimate, Memorisation, Protocol, RealScore, Scale, ScoreRecord, SetScore
from darkroom.files import digest_file, write_bytes, write_json, write_text
from darkroom.params import load_params
from darkroom.registry import proof
from darkroom.workspace import Workspace
from tests import forks

REPOSITORY = Path(__file__).parents[2]
CLASSES = [str(digit) for digit in range(10)]
STEPS = 40


def make_project(root: Path) -> Workspace:
    """A directory with small parameters and no outputs yet."""
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    content["train"]["model"] |= {"channels": [32], "num_res_blocks": 1, "attention_resolutions": []}
    content["train"]["steps"] = STEPS
    content["train"]["learning_rate"] = 2e-3
    content["reference"] |= {"channels": [8], "features": 8, "learning_rate": 2e-3}
    content["sample"] |= {"sampler": "dpmpp_2m", "steps": 3, "num_images": 20, "seeds": [0, 1]}
    content["registry"]["gate"] |= {"max_fid": 0.8, "margin": 2.0, "retraining_scatter": 0.0}
    content["evaluate"] |= {"kid_subsets": 2, "kid_subset_size": 5}
    write_text(root / "params.yaml", yaml.safe_dump(content))
    write_text(root / "dvc.yaml", "stages: {}\n")
    return Workspace(root)


def make_unlabelled(root: Path) -> Workspace:
    """The same for images without classes."""
    project = make_project(root)
    set_params(project, "data", source="images", num_classes=0)
    set_params(project, "train", label_dropout=0.0)
    set_params(project, "sample", guidance_scale=1.0)
    return project


def set_params(workspace: Workspace, group: str, **values: Any) -> None:
    """Change parameters in place."""
    content = yaml.safe_load(workspace.params_file.read_text())
    content[group] |= values
    write_text(workspace.params_file, yaml.safe_dump(content))


def write_model(workspace: Workspace, seed: int) -> str:
    """What train writes, for a network with random weights; return the digest of the weights."""
    params = load_params(workspace.params_file)
    train, classes = params.train, CLASSES[: params.data.num_classes]
    torch.manual_seed(seed)
    network = build_unet(train.model, 8, 1, len(classes), train.label_dropout)
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    workspace.models.mkdir(exist_ok=True)
    save_file(tensors, workspace.models / WEIGHTS_FILE)
    digest, fingerprint = digest_file(workspace.models / WEIGHTS_FILE), f"{seed:064x}"
    card = ModelCard(
        image_size=8,
        channels=1,
        classes=classes,
        unet=train.model,
        schedule=train.schedule,
        label_dropout=train.label_dropout,
        fingerprint=fingerprint,
        data_digest="d" * 64,
        weights_digest=digest,
    )
    write_json(workspace.models / CARD_FILE, card.model_dump())
    run = {"fingerprint": fingerprint, "weights_digest": digest, "data_digest": "d" * 64, "steps": STEPS}
    write_json(workspace.models / "run.json", run)
    rows = [{"step": step, "images": step * 128, "loss": 1 / step, "lr": 2e-3} for step in range(1, STEPS + 1)]
    write_text(workspace.train_reports / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return digest


def write_score(
    workspace: Workspace,
    fid: float = 0.5,
    accuracy: float | None = 0.97,
    guided_accuracy: float | None = 0.995,
    **protocol: Any,
) -> ScoreRecord:
    """What evaluate writes, with chosen figures; without classes both accuracies are None."""
    weights = ModelCard.model_validate_json((workspace.models / CARD_FILE).read_bytes()).weights_digest
    record = score_record(weights, fid, accuracy, guided_accuracy, **protocol)
    write_json(workspace.metrics_file, record.to_json_dict())
    return record


def score_record(
    weights: str = "w" * 64,
    fid: float = 0.5,
    accuracy: float | None = 0.97,
    guided_accuracy: float | None = 0.995,
    spread: float = 0.05,
    near_copies: float = 0.01,
    **protocol: Any,
) -> ScoreRecord:
    """A record with chosen figures."""
    fields = {
        "code": code_digest(),
        "extractor": "classifier",
        "extractor_weights": "e" * 64,
        "classifier": "e" * 64,
        "data": "d" * 64,
        "reference": "r" * 64,
        "reference_images": 1438,
        "published_statistics": None,
        "num_images": 20,
        "seeds": [0, 1],
        "sampler": "dpmpp_2m",
        "steps": 3,
        "spacing": "trailing",
        "eta": 0.0,
        "clipping": "static",
        "guidance_scale": 2.0,
        "guidance_interval": None,
        "precision": "fp32",
        "resize": "none",
        "kid_subsets": 2,
        "kid_subset_size": 5,
        "neighbours": 3,
    }
    measured = Protocol.model_validate(fields | protocol)

    def score(guidance_scale: float, class_accuracy: float | None) -> SetScore:
        return SetScore(
            guidance_scale=guidance_scale,
            fid=estimate(fid, spread),
            fid_deviation=spread,
            fid_infinity=fid,
            kid=estimate(0.01, 0.001),
            kid_std=0.001,
            precision=estimate(0.8, 0.01),
            recall=estimate(0.7, 0.01),
            memorisation=Memorisation(
                near_copies=near_copies, threshold=0.5, median_ratio=1.0, num_neighbours=measured.reference_images
            ),
            class_accuracy=None if class_accuracy is None else estimate(class_accuracy, 0.002),
            class_accuracies=None if class_accuracy is None else [class_accuracy] * len(CLASSES),
        )

    return ScoreRecord(
        weights_digest=weights,
        finite=True,
        unguided=score(1.0, accuracy),
        guided=score(measured.guidance_scale, guided_accuracy),
        floor=RealScore(
            num_images=360,
            fid=0.7,
            kid=0.01,
            kid_std=0.001,
            precision=0.8,
            recall=0.8,
            class_accuracy=None if accuracy is None else 0.98,
            class_accuracies=None if accuracy is None else [0.98] * len(CLASSES),
        ),
        scale=Scale(noise_0_1=1, noise_0_2=3, noise_0_4=15, class_means=16, pure_noise=190),
        raw_fid=2 * fid,
        protocol=measured,
        protocol_digest=measured.digest,
    )


def estimate(value: float, spread: float) -> Estimate:
    """Over two seeds."""
    seeds = [value - spread / 2**0.5, value + spread / 2**0.5]
    return Estimate(value=value, spread=spread, low=value - spread, high=value + spread, seeds=seeds)


def write_extractor(workspace: Workspace) -> None:
    """What reference writes, for a classifier of random weights and random images."""
    from darkroom.evaluation.features import CARD_FILE as EXTRACTOR_CARD
    from darkroom.evaluation.features import WEIGHTS_FILE as EXTRACTOR_WEIGHTS
    from darkroom.evaluation.features import Extractor, ExtractorCard
    from darkroom.evaluation.reference import write_reference

    torch.manual_seed(0)
    card = ExtractorCard(
        kind="classifier",
        image_size=8,
        image_channels=1,
        classes=CLASSES,
        channels=[8],
        features=8,
        held_out_accuracy=1.0,
        data_digest="d" * 64,
        classifier_digest="",
    )
    workspace.extractor.mkdir(parents=True)
    classifier = card.build()
    save_file(classifier.state_dict(), workspace.extractor / EXTRACTOR_WEIGHTS)
    card = card.model_copy(update={"classifier_digest": digest_file(workspace.extractor / EXTRACTOR_WEIGHTS)})
    write_json(workspace.extractor / EXTRACTOR_CARD, card.model_dump())
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8))
    labels = torch.arange(60) % 10
    extractor = Extractor(card, classifier)
    write_reference(
        workspace.extractor, extractor, (images[:40], labels[:40]), (images[40:], labels[40:]), 0, max_features=1000
    )


def write_validation(workspace: Workspace) -> None:
    """What validate writes for the data that the project's model was trained on."""
    write_json(workspace.reports / "validation.json", {"success": True, "dataset": "d" * 64})


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with MLflow's tables: making them takes seconds, copying them nothing.

    One is made for all files and processes of a run: a fixture that is imported counts as another one in each file.
    """
    from darkroom.registry.tracking import connect

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    made = root / "mlflow-template.db"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            with pytest.MonkeyPatch.context() as patch:
                for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
                    patch.delenv(name, raising=False)
                project = Workspace(tmp_path_factory.mktemp("database"))
                connect(project)
            write_bytes(made, (project.state / "mlflow.db").read_bytes())
        return made.read_bytes()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: bytes) -> Workspace:
    """A project with one scored model and an empty registry; versions are proven in forks of a warm process."""
    monkeypatch.setattr(proof, "subprocess", forks)
    for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
        monkeypatch.delenv(name, raising=False)
    project = make_project(tmp_path / "project")
    write_bytes(project.state / "mlflow.db", empty_database)
    write_model(project, 1)
    write_score(project)
    write_validation(project)
    return project
