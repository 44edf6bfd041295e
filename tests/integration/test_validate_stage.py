"""prepare and validate as the pipeline runs them: good data passes, bad data stops with its reason."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from darkroom.cli import main
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.stages import prepare, validate
from darkroom.workspace import Workspace

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project directory with the repository's own parameters, pipeline and suite."""
    for name in ("dvc.yaml", "params.yaml", "expectations"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    return tmp_path


def change(project: Path, group: str, **values: object) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[group].update(values)
    path.write_text(yaml.safe_dump(params).replace("0.002", "2.0e-3"))


def stage(project: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DVC_STAGE": name}
    command = [sys.executable, "-m", f"darkroom.stages.{name}"]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def photos(project: Path, **validation: object) -> Path:
    """Twenty images of noise in two classes, and the parameters for them."""
    root = project / "data" / "raw" / "photos"
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{i}.png")
    change(project, "data", source="data/raw/photos", num_classes=2)
    change(project, "validate", **{"min_images_per_class": 4} | validation)
    return root


def test_digits_are_prepared_and_accepted_with_the_same_bytes_each_time(project: Path) -> None:
    workspace = Workspace(project)
    outputs = []
    for _ in range(2):
        prepare.run(workspace)
        validate.run(workspace)
        files = [*workspace.prepared.iterdir(), *workspace.reports.iterdir()]
        outputs.append({path.relative_to(project).as_posix(): digest_file(path) for path in files})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 9
    report = json.loads((workspace.reports / "validation.json").read_text())
    assert report["success"] is True
    assert report["dataset"] == json.loads((workspace.prepared / "dataset.json").read_text())["digest"]
    assert report["statistics"]["images"] == 1797
    assert report["statistics"]["per_class"]["8"] == {"train": 139, "test": 35}  # 174 in all
    assert [entry["name"] for entry in report["expectations"] if not entry["success"]] == []


@pytest.mark.slow
def test_corrupt_file_stops_the_pipeline_by_name(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    workspace, root = Workspace(project), photos(project)
    whole = (root / "bee" / "7.png").read_bytes()
    (root / "bee" / "7.png").write_bytes(whole[:60])
    (workspace.reports).mkdir()
    (workspace.reports / "validation.json").write_text("{}")  # of an earlier run

    prepare.run(workspace)
    assert "1 images could not be decoded" in caplog.text

    refused = stage(project, "validate")
    assert refused.returncode == 2
    lines = refused.stderr.splitlines()
    assert lines[0].startswith(
        'validate: dataset photos: expectation "decodable" failed: '
        "expected at most 0 images that cannot be decoded, found 1: bee/7.png ("
    )
    assert lines[1:] == [f"validate: the images and all findings are in {workspace.reports / 'validation.html'}"]
    assert "Traceback" not in refused.stderr
    assert [path.name for path in workspace.reports.iterdir()] == ["validation.html"]
    assert "bee/7.png" in (workspace.reports / "validation.html").read_text()


def test_missing_source_stops_prepare_and_leaves_nothing(project: Path) -> None:
    change(project, "data", source="data/raw/nowhere")
    refused = stage(project, "prepare")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"prepare: {project}/data/raw/nowhere: no such file or folder; data.source in params.yaml names it\n"
    )
    assert [path.name for path in (project / "data").iterdir()] == ["raw"]


def test_accepting_a_data_set_changes_nothing_that_train_depends_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "expectations" / "accepted.json").unlink(missing_ok=True)
    workspace, root = Workspace(project), photos(project)
    prepare.run(workspace)
    validate.run(workspace)
    report, page = workspace.reports / "validation.json", workspace.reports / "validation.html"
    before = report.read_bytes()
    assert "no accepted data set" in page.read_text()
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as done:
        main(["data", "accept", "--reason", "first"])
    assert done.value.code == 0
    validate.run(workspace)
    assert report.read_bytes() == before
    assert "This is the accepted data set" in page.read_text()

    for i in range(10, 20):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "bee" / f"{i}.png")
    prepare.run(workspace)
    caplog.clear()
    validate.run(workspace)
    assert "warning: class_drift: expected class shares within 0.1 of the accepted data set's" in caplog.text
    assert "found: 0.167 (against photos " in caplog.text  # 10 of 20, then 20 of 30
    with pytest.raises(SystemExit) as done:
        main(["data", "drift"])
    assert done.value.code == 1


def test_copy_across_the_source_s_own_splits_stops_the_pipeline_by_name(project: Path) -> None:
    workspace, _ = Workspace(project), photos(project)
    prepare.run(workspace)
    manifest = pd.read_parquet(workspace.prepared / "manifest.parquet")
    test, train = ((manifest["split"] == split).idxmax() for split in ("test", "train"))
    manifest.loc[test, "sha256"] = manifest.loc[train, "sha256"]
    manifest.to_parquet(workspace.prepared / "manifest.parquet")
    with pytest.raises(InputError) as refused:
        validate.run(workspace)
    assert 'expectation "no_leak" failed' in str(refused.value)
    assert all(manifest.loc[row, "path"] in str(refused.value) for row in (test, train))
    assert [path.name for path in workspace.reports.iterdir()] == ["validation.html"]


def test_unlabelled_images_are_accepted(project: Path) -> None:
    workspace, root = Workspace(project), photos(project)
    for path in sorted(root.rglob("*.png")):
        path.rename(root / f"{path.parent.name}{path.name}")
        with suppress(OSError):
            path.parent.rmdir()
    change(project, "data", num_classes=0)
    change(project, "train", label_dropout=0.0)
    change(project, "sample", guidance_scale=1.0)
    prepare.run(workspace)
    validate.run(workspace)
    report = json.loads((workspace.reports / "validation.json").read_text())
    assert report["success"] is True
    assert report["statistics"]["per_class"] == {}
    assert "20 images without labels" in (workspace.reports / "validation.html").read_text()
