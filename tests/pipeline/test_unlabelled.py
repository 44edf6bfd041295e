"""Images without classes, through the real pipeline to a model that serves."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from darkroom.files import read_json
from darkroom.registry.promotion import history, promote, register, status
from darkroom.registry.tracking import current, tracking_uri
from darkroom.workspace import Workspace
from flows.champion import directions, headline
from tests.pipeline.project import STAGES, change, dvc, environment, make_small, metrics, outcomes

pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.slow]


def write_images(folder: Path) -> None:
    """60 grey images that are dark at the top and light at the bottom, with a light spot somewhere."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(60):
        pixels = np.linspace(10, 180, 8)[:, None] + generator.normal(0, 12, (8, 8))
        row, column = generator.integers(0, 7, 2)
        pixels[row : row + 2, column : column + 2] += 60
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")


@pytest.fixture(scope="module")
def project(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_small(tmp_path_factory.mktemp("pipeline") / "project")
    write_images(root / "data" / "raw" / "slopes")
    change(root, "data", source="data/raw/slopes", num_classes=0)
    change(root, "validate", min_images_per_class=10)
    change(root, "train", label_dropout=0.0)
    change(root, "sample", guidance_scale=1.0)
    change(root, "registry.gate", max_fid=1e6, max_near_copies=1.0)
    assert outcomes(dvc(root, "repro")) == dict.fromkeys(STAGES, "ran")
    return root


def test_no_stage_knows_a_class(project: Path) -> None:
    assert read_json(project / "data/prepared/dataset.json")["classes"] == []
    assert read_json(project / "models/model.json")["classes"] == []
    assert read_json(project / "models/extractor/extractor.json")["classes"] == []
    found = metrics(project)
    for group in ("unguided", "guided", "floor"):
        assert "class_accuracy" not in found[group]
        fid = found[group]["fid"]
        assert (fid if group == "floor" else fid["value"]) > 0
    assert found["unguided"] == found["guided"]
    assert found["scale"]["noise_0_1"] < found["scale"]["noise_0_4"] < found["scale"]["pure_noise"]
    labels = np.load(project / "data/samples/labels.npy")
    assert labels.tolist() == [0] * 40
    assert Image.open(project / "reports/samples.png").height > 3 * 48, "40 images in rows of 16"


def test_the_reference_classifier_tells_how_an_image_was_turned(project: Path) -> None:
    assert read_json(project / "models/extractor/extractor.json")["held_out_accuracy"] > 0.7


def test_pictures_are_drawn_without_a_class_and_a_class_is_refused(project: Path, tmp_path: Path) -> None:
    def sample(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "darkroom", "sample", "--out", str(tmp_path / "out"), *arguments]
        return subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)

    assert sample("--num", "20", "--film").returncode == 0
    record = read_json(tmp_path / "out" / "samples.json")
    assert record["classes"] == []
    assert record["files"] == [f"{number:04d}.png" for number in range(20)]
    refused = sample("--class", "3")
    assert refused.returncode == 2
    assert refused.stderr == ("darkroom: class '3': this model was trained without classes; none can be asked for\n")


def test_the_model_is_promoted_loaded_and_asked_for_rows_without_columns(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
        monkeypatch.delenv(name, raising=False)
    workspace = Workspace(project)
    assert register(workspace).created
    assert promote(workspace).promoted
    assert [entry.outcome for entry in history(workspace)] == ["promoted"]
    champion = status(workspace)["champion"]
    assert champion is not None
    assert not any("accuracy" in name for name in champion["figures"])
    assert "accuracy" not in headline(workspace, champion)
    assert "pd.DataFrame(index=range(2))" in directions(workspace)

    with current(tracking_uri(workspace)):
        model = mlflow.pyfunc.load_model(f"models:/{workspace.params().registry.name}@champion")
    drawn = model.predict(pd.DataFrame(index=range(3)), params={"seed": 1})["png"]
    assert len(set(drawn)) == 3
    assert Image.open(io.BytesIO(base64.b64decode(drawn[0]))).size == (8, 8)
