"""The registered model for real: what is in it, what it draws, what it refuses, and that it needs nothing of ours."""

import base64
import io
import json
import os
import pickletools
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.files import read_json, write_json
from darkroom.registry.package import REQUIREMENTS, requirements
from darkroom.registry.promotion import register
from darkroom.registry.tracking import connect, tracking_uri
from darkroom.workspace import Workspace
from tests import forks
from tests.integration.registry_project import (
    empty_database,
    make_project,
    make_unlabelled,
    workspace,
    write_model,
    write_score,
)

__all__ = ["empty_database", "workspace"]  # fixtures

SAMPLES = b"\x89PNG\r\n\x1a\n, and so on"


def versions(project: Workspace) -> list[Any]:
    return list(connect(project).search_model_versions("name = 'digits'"))


def artifacts(project: Workspace) -> Path:
    (directory,) = (project.state / "artifacts" / "models").glob("*/artifacts")
    return directory


def clean_environment(project: Workspace, **more: str) -> dict[str, str]:
    keep = ("PATH", "HOME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    kept = {key: os.environ[key] for key in keep if key in os.environ}
    return kept | {"MLFLOW_TRACKING_URI": tracking_uri(project)} | more


def elsewhere(
    project: Workspace,
    directory: Path,
    program: str,
    python: str = sys.executable,
    run: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run,
    **environment: str,
) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process and a directory that have nothing of this project."""
    directory.mkdir()
    return run(
        [python, "-I", "-c", textwrap.dedent(program)],
        cwd=directory,
        env=clean_environment(project, **environment),
        capture_output=True,
        text=True,
    )


def pngs(texts: list[str]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) for text in texts]


def pixels(images: list[Image.Image]) -> list[list[int]]:
    return [list(image.tobytes()) for image in images]


def drawn_by_the_core(project: Workspace, labels: list[int], seed: int | list[int], **changes: Any) -> list[list[int]]:
    """The oracle: the core's own sampler on the weights on disk."""
    settings = project.params().sample.changed(**changes)
    model = DiffusionModel.load(project.models)
    seeds = torch.tensor(seed) if isinstance(seed, list) else seed
    return [image.flatten().tolist() for image in model.draw(torch.tensor(labels), settings, seed=seeds)]


# What is in it


def is_pickle(content: bytes) -> bool:
    """Whether a pickle starts here: opcodes up to STOP, at least one of which builds something."""
    operations = []
    try:
        for operation, _, _ in pickletools.genops(content):
            operations.append(operation.name)
    except ValueError:
        return False
    return len(operations) > 2 or "PROTO" in operations


def unpickled_somewhere(content: bytes, name: str) -> list[str]:
    """Where in a file something lies that a loader would unpickle; archives are looked into."""
    found = [name] if is_pickle(content) else []
    if zipfile.is_zipfile(io.BytesIO(content)):  # torch.save, npz, joblib: wherever in the file the archive begins
        found.append(f"{name} (an archive)")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                found += unpickled_somewhere(archive.read(member), f"{name}/{member}")
    return found


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    import pickle

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert unpickled_somewhere(pickle.dumps({"a": [1.5, "b"]}, protocol), "file")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "new.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "hidden.json", "w") as archive:
        archive.writestr("notes.txt", pickle.dumps([1]))
    (tmp_path / "behind.json").write_bytes(b'{"a": 1}\n' + (tmp_path / "hidden.json").read_bytes())
    for path in tmp_path.iterdir():
        assert unpickled_somewhere(path.read_bytes(), path.name), path
    assert "hidden.json/notes.txt" in unpickled_somewhere((tmp_path / "hidden.json").read_bytes(), "hidden.json")


def test_the_package_is_code_safetensors_json_and_a_card_and_nothing_in_it_is_pickled(workspace: Workspace) -> None:
    (workspace.reports / "samples.png").write_bytes(SAMPLES)
    register(workspace)
    files = {str(path.relative_to(artifacts(workspace))): path for path in artifacts(workspace).rglob("*")}
    files = {name: path for name, path in files.items() if path.is_file()}
    suffixes = {path.suffix for path in files.values()}
    assert suffixes <= {".py", ".json", ".yaml", ".txt", ".safetensors", ".md", ".png", ""}
    assert {name for name, path in files.items() if not path.suffix} <= {"MLmodel", "registered_model_meta"}
    inside = {"ema.safetensors", "model.json", "draw.json", "README.md", "samples.png"}
    assert {name for name in files if name.startswith("artifacts/")} == {f"artifacts/model/{name}" for name in inside}
    assert not [place for name, path in files.items() for place in unpickled_somewhere(path.read_bytes(), name)]
    for name, path in files.items():
        if path.suffix not in (".safetensors", ".png"):
            path.read_text(encoding="utf-8")
        if path.suffix == ".safetensors":
            header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
            assert {"dtype", "shape", "data_offsets"} == set(next(iter(header.values()))), name
    described = yaml.safe_load(files["MLmodel"].read_text())["flavors"]["python_function"]
    assert "python_model" not in described, "that would be a pickle"
    assert described["loader_module"] == "mlflow.pyfunc.loaders.code_model"


def test_the_package_says_what_it_is_without_being_loaded(workspace: Workspace, monkeypatch: Any) -> None:
    import mlflow

    record = write_score(workspace)
    register(workspace)
    described = yaml.safe_load((artifacts(workspace) / "MLmodel").read_text())
    signature = described["signature"]
    columns = {column["name"]: (column["type"], column["required"]) for column in json.loads(signature["inputs"])}
    assert columns == {"class_label": ("any", True), "seed": ("any", False)}
    defaults = {param["name"]: (param["type"], param["default"]) for param in json.loads(signature["params"])}
    assert defaults == {
        "guidance_scale": ("double", 2.0),
        "sampler": ("string", "dpmpp_2m"),
        "steps": ("long", 3),
        "seed": ("long", 0),
    }
    example = read_json(artifacts(workspace) / "input_example.json")
    assert example == {"columns": ["class_label"], "data": [[0], [1], [2]]}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(workspace))
    assert mlflow.models.get_model_info("models:/digits@challenger").metadata == {
        "classes": [str(digit) for digit in range(10)],
        "weights_digest": record.weights_digest,
        "protocol_digest": record.protocol_digest,
    }


def test_the_requirements_are_exact_and_of_no_machine(workspace: Workspace) -> None:
    register(workspace)
    lines = (artifacts(workspace) / "requirements.txt").read_text().split()
    assert lines == requirements()
    assert all("==" in line and "+" not in line for line in lines)
    assert {line.split("==")[0] for line in lines} == set(REQUIREMENTS)


def test_the_card_is_in_the_package_in_the_run_and_on_the_versions_page(workspace: Workspace) -> None:
    (workspace.reports / "samples.png").write_bytes(SAMPLES)
    registered = register(workspace)
    card = (artifacts(workspace) / "artifacts" / "model" / "README.md").read_text()
    assert "](samples.png)" in card
    assert (artifacts(workspace) / "artifacts" / "model" / "samples.png").read_bytes() == SAMPLES
    client = connect(workspace)
    run_files = {file.path for file in client.list_artifacts(registered.run_id)}
    assert "model_card.md" in run_files
    (version,) = versions(workspace)
    assert version.description.startswith(card.split("\n\n![")[0])
    assert "samples.png" not in version.description


# What it draws


@pytest.mark.slow
def test_the_model_draws_in_a_clean_process_from_another_directory(workspace: Workspace, tmp_path: Path) -> None:
    register(workspace)
    program = """
        import json, sys
        import mlflow, pandas as pd
        model = mlflow.pyfunc.load_model("models:/digits@challenger")
        def draw(rows, **params):
            return list(model.predict(pd.DataFrame(rows), params=params)["png"])
        digits = list(range(10))
        heavy = {"dvc", "great_expectations", "prefect", "boto3", "torchmetrics"} & set(sys.modules)
        print(json.dumps({
            "all": draw({"class_label": digits}, seed=3), "again": draw({"class_label": digits}, seed=3),
            "first": draw({"class_label": [0, 1, 2]}, seed=3), "other": draw({"class_label": [0, 1, 2]}, seed=4),
            "default": draw({"class_label": [0]}),
            "spelled": draw({"class_label": [0]}, guidance_scale=2.0, sampler="dpmpp_2m", steps=3, seed=0),
            "rows": draw({"class_label": [3, 1, 3], "seed": [7, 2**63 - 1, 7]}, steps=2),
            "code": sys.modules["darkroom"].__file__, "heavy": sorted(heavy),
            "device": str(next(model.unwrap_python_model().model.network.parameters()).device),
        }))
    """
    done = elsewhere(workspace, tmp_path / "elsewhere", program, DARKROOM_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["code"]).is_relative_to(workspace.state / "artifacts")
    assert (found["heavy"], found["device"]) == ([], "cpu")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    images = pngs(found["all"])
    assert [(image.format, image.mode, image.size) for image in images] == [("PNG", "L", (8, 8))] * 10
    assert found["again"] == found["all"]
    assert found["first"] == found["all"][:3], "an image may not depend on the rows beside it"
    assert not set(found["other"]) & set(found["first"])
    assert found["default"] == found["spelled"]
    assert pixels(images) == drawn_by_the_core(workspace, list(range(10)), 3)
    assert found["rows"][0] == found["rows"][2] != found["rows"][1]
    for png, label, seed in zip(found["rows"], [3, 1, 3], [7, 2**63 - 1, 7], strict=True):
        assert pixels(pngs([png])) == drawn_by_the_core(workspace, [label], seed, steps=2)


def load(project: Workspace) -> Any:
    """The registered model, as an application loads it, in this process."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DARKROOM_ARTIFACT_ROOT", "DARKROOM_STATE"):
            patch.delenv(name, raising=False)
        register(project)
    return mlflow.pyfunc.load_model(str(artifacts(project)))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> tuple[Any, Workspace]:
    """A registered model, loaded, and its project."""
    project = make_project(tmp_path_factory.mktemp("labelled"))
    project.state.mkdir()
    (project.state / "mlflow.db").write_bytes(empty_database)
    write_model(project, 1)
    write_score(project)
    return load(project), project


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> tuple[Any, Workspace]:
    """The same for images without classes."""
    project = make_unlabelled(tmp_path_factory.mktemp("unlabelled"))
    project.state.mkdir()
    (project.state / "mlflow.db").write_bytes(empty_database)
    write_model(project, 1)
    write_score(project, accuracy=None, guided_accuracy=None, guidance_scale=1.0)
    model = load(project)
    (version,) = versions(project)
    assert not any("accuracy" in name for name in version.tags)
    return model, project


def test_a_row_with_a_seed_depends_on_nothing_but_itself(labelled: tuple[Any, Workspace]) -> None:
    model, project = labelled
    rows = pd.DataFrame({"class_label": [3, 1, 4, 1], "seed": [7, 7, 0, 8]})
    drawn = list(model.predict(rows)["png"])
    assert len(set(drawn)) == 4
    assert list(model.predict(rows[::-1].reset_index(drop=True))["png"]) == drawn[::-1]
    assert list(model.predict(rows.iloc[[1]])["png"]) == drawn[1:2]
    assert pixels(pngs(drawn)) == drawn_by_the_core(project, [3, 1, 4, 1], [7, 7, 0, 8])
    # a row's own seed is the parameter of a request with this row alone
    assert list(model.predict(pd.DataFrame({"class_label": [4]}), params={"seed": 0})["png"]) == drawn[2:3]


def test_no_rows_give_no_images(labelled: tuple[Any, Workspace]) -> None:
    empty = pd.Series([], dtype="int64")
    for rows in (pd.DataFrame({"class_label": empty}), pd.DataFrame({"class_label": empty, "seed": empty})):
        drawn = labelled[0].predict(rows)
        assert list(drawn.columns) == ["png"]
        assert len(drawn) == 0


def test_a_model_without_classes_draws_a_row_without_columns_or_with_a_seed(unlabelled: tuple[Any, Workspace]) -> None:
    model, project = unlabelled
    assert model.metadata.get_input_schema() is None
    drawn = list(model.predict(pd.DataFrame(index=range(3)), params={"seed": 3})["png"])
    assert pixels(pngs(drawn)) == drawn_by_the_core(project, [0, 0, 0], 3)
    assert list(model.predict(pd.DataFrame(index=range(2)), params={"seed": 3})["png"]) == drawn[:2]
    assert len(model.predict(pd.DataFrame())) == 0
    seeded = list(model.predict(pd.DataFrame({"seed": [5, 3, 5]}))["png"])
    assert pixels(pngs(seeded)) == drawn_by_the_core(project, [0, 0, 0], [5, 3, 5])
    assert seeded[1] == drawn[0]


# What it refuses

LABELS = pd.DataFrame({"class_label": [0, 1]})
SEEDED = pd.DataFrame({"class_label": [0, 1], "seed": [5, 6]})


def refusal(model: Any, data: Any, params: dict[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as error:
        model.predict(data, params=params)
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"
    assert error.value.get_http_status_code() == 400
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "params", "words"),
    [
        (LABELS, {"guidance": 3.0}, "unknown parameter 'guidance': expected guidance_scale, sampler, steps, seed"),
        (LABELS, {"guidance_scale": 3.0, "stepps": 5}, "unknown parameter 'stepps'"),
        (LABELS, {"steps": 0}, "steps = 0: expected at least 1"),
        (LABELS, {"steps": 1001}, "steps = 1001: expected 1 to 1000"),
        (LABELS, {"guidance_scale": -1.0}, "guidance_scale = -1"),
        (LABELS, {"guidance_scale": float("nan")}, "guidance_scale = nan"),
        (LABELS, {"sampler": "euler"}, "sampler = 'euler': expected"),
        (LABELS, {"seed": -1}, "seed = -1: expected 0 to 2**63 - 1"),
        (LABELS, {"steps": "many"}, "steps"),
        (
            pd.DataFrame({"class_label": [3, 12]}),
            {},
            "class_label = 12 in row 1: expected 0 to 9 (0, 1, 2, 3",
        ),
        (pd.DataFrame({"class_label": [-1]}), {}, "class_label = -1 in row 0: expected 0 to 9"),
        (
            pd.DataFrame({"class_label": [1, None]}, dtype=object),
            {},
            "class_label is missing in row 1: expected 0 to 9",
        ),
        (pd.DataFrame({"class_label": [1.5]}), {}, "class_label = 1.5 in row 0: expected 0 to 9"),
        (pd.DataFrame({"class_label": ["three"]}), {}, "class_label = 'three' in row 0: expected 0 to 9"),
        (pd.DataFrame({"class_label": [3, True]}, dtype=object), {}, "class_label = True in row 1: expected 0 to 9"),
        (pd.DataFrame({"label": [1]}), {}, "class_label"),
        (pd.DataFrame({"class_label": [1], "guidance_scale": [3.0]}), {}, "unknown column 'guidance_scale'"),
        (pd.DataFrame({"class_label": [0] * 257}), {}, "257 rows: expected at most 256 in one request"),
        (SEEDED, {"seed": 3}, "seed is a column and a parameter: expected one of them"),
        (SEEDED.assign(seed=[5, -6]), {}, "seed = -6 in row 1: expected 0 to 2**63 - 1"),
        (SEEDED.assign(seed=[None, 5]), {}, "seed is missing in row 0: expected 0 to 2**63 - 1"),
        (SEEDED.assign(seed=[5.0, 6.5]), {}, "seed = 5.0 in row 0: expected 0 to 2**63 - 1"),
        (SEEDED.assign(seed=[5, 2**63]), {}, f"seed = {2**63} in row 1: expected 0 to 2**63 - 1"),
        (SEEDED.assign(seed=["a", "b"]), {}, "seed = 'a' in row 0: expected 0 to 2**63 - 1"),
        (
            pd.DataFrame({"class_label": [0] * 200}),
            {"steps": 200},
            "200 images x 200 network evaluations x 2 for guidance = 80000: expected at most 64000 in one request",
        ),
        (
            pd.DataFrame({"class_label": [0] * 256}),
            {"steps": 126, "sampler": "heun", "guidance_scale": 1.0},
            "256 images x 251 network evaluations = 64256",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    labelled: tuple[Any, Workspace], data: Any, params: dict[str, Any], words: str
) -> None:
    assert words in refusal(labelled[0], data, params)


@pytest.mark.parametrize(
    ("data", "params", "words"),
    [
        (
            pd.DataFrame({"class_label": [0]}),
            {},
            "unknown column 'class_label': expected seed or none, as this model has",
        ),
        ({"class_label": [0]}, {}, "unknown column 'class_label'"),
        ([0, 0], {}, "input of type list: expected a data frame with a row for each image"),
        (None, {}, "input of type NoneType"),
        (pd.DataFrame(index=range(257)), {}, "257 rows: expected at most 256"),
        (pd.DataFrame(index=range(2)), {"guidance_scale": 2.0}, "guidance_scale = 2.0"),
        (pd.DataFrame(index=range(2)), {"stepps": 5}, "unknown parameter 'stepps'"),
        (pd.DataFrame({"seed": [1, 2]}), {"seed": 3}, "seed is a column and a parameter"),
        (pd.DataFrame({"seed": [1.0, None]}), {}, "seed is missing in row 1"),
        (pd.DataFrame({"seed": [1.0, 2.0]}), {}, "seed = 1.0 in row 0: expected 0 to 2**63 - 1"),
        (pd.DataFrame({"seed": [1, 2**63]}), {}, f"seed = {2**63} in row 1: expected 0 to 2**63 - 1"),
        (pd.DataFrame([[1, 2]], columns=["seed", "seed"]), {}, "column 'seed' is there twice"),
    ],
)
def test_what_a_model_without_classes_cannot_do_is_refused_by_name(
    unlabelled: tuple[Any, Workspace], data: Any, params: dict[str, Any], words: str
) -> None:
    assert words in refusal(unlabelled[0], data, params)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DARKROOM_DEVICE", "toaster", "DARKROOM_DEVICE = 'toaster'"),
        ("DARKROOM_MAX_IMAGES", "0", "DARKROOM_MAX_IMAGES = '0': expected a whole number, at least 1"),
        ("DARKROOM_MAX_WORK", "lots", "DARKROOM_MAX_WORK = 'lots': expected a whole number, at least 1"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_at_load(
    labelled: tuple[Any, Workspace], monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    import mlflow

    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(words)):
        mlflow.pyfunc.load_model(str(artifacts(labelled[1])))


def test_who_serves_it_can_set_other_bounds(labelled: tuple[Any, Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("DARKROOM_MAX_IMAGES", "3")
    monkeypatch.setenv("DARKROOM_MAX_WORK", "12")
    model = mlflow.pyfunc.load_model(str(artifacts(labelled[1])))
    assert "4 rows: expected at most 3" in refusal(model, pd.DataFrame({"class_label": [0] * 4}), {})
    assert len(model.predict(pd.DataFrame({"class_label": [0] * 2}))) == 2
    assert "3 images x 3 network evaluations x 2 for guidance = 18" in refusal(
        model, pd.DataFrame({"class_label": [0] * 3}), {}
    )
    assert len(model.predict(pd.DataFrame({"class_label": [0] * 3}), params={"guidance_scale": 0.0})) == 3


def _flip(model: Path) -> None:
    content = bytearray((model / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "ema.safetensors").write_bytes(content)


def _cut(model: Path) -> None:
    (model / "ema.safetensors").write_bytes((model / "ema.safetensors").read_bytes()[:1000])


def _other_digest(model: Path) -> None:
    write_json(model / "model.json", read_json(model / "model.json") | {"weights_digest": "0" * 64})


@pytest.mark.slow
def test_weights_that_were_damaged_in_the_store_are_refused_at_load(workspace: Workspace, tmp_path: Path) -> None:
    register(workspace)
    whole = artifacts(workspace)
    uris = []
    for number, damage in enumerate((_cut, _other_digest)):
        shutil.copytree(whole, tmp_path / str(number))
        damage(tmp_path / str(number) / "artifacts" / "model")
        uris.append(str(tmp_path / str(number)))
    _flip(whole / "artifacts" / "model")
    program = """
        import json, os, mlflow
        for uri in json.loads(os.environ["URIS"]):
            try:
                mlflow.pyfunc.load_model(uri)
            except Exception as error:
                print(type(error).__name__, error)
    """
    uris.append("models:/digits@challenger")
    done = elsewhere(workspace, tmp_path / "elsewhere", program, run=forks.run, URIS=json.dumps(uris))
    said = done.stdout.splitlines()
    assert len(said) == 3, done.stderr
    for line in said:
        assert line.startswith("InputError")
        assert "ema.safetensors: sha256 is" in line
        assert "model.json says" in line


# It needs nothing of ours


@pytest.fixture(scope="module")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment made from the requirements alone."""
    root = tmp_path_factory.mktemp("own")
    uv = str(Path(sys.executable).with_name("uv"))
    (root / "requirements.txt").write_text("\n".join(requirements()))
    # uv does not read pip's settings: where wheels are local (a CPU build of torch, say) it has to be told as well
    links = os.environ.get("UV_FIND_LINKS") or ",".join(os.environ.get("PIP_FIND_LINKS", "").split())
    environment = os.environ | ({"UV_FIND_LINKS": links} if links else {})
    environment = environment | {"UV_INDEX_STRATEGY": os.environ.get("UV_INDEX_STRATEGY", "unsafe-best-match")}
    python = str(root / "venv" / "bin" / "python")
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(root / "venv")],
        [uv, "pip", "install", "--quiet", "--python", python, "-r", str(root / "requirements.txt")],
    ):
        subprocess.run(command, check=True, env=environment, cwd=root)
    return python


@pytest.mark.soak
def test_the_model_loads_and_draws_in_an_environment_of_its_requirements_alone(
    workspace: Workspace, tmp_path: Path, own_environment: str
) -> None:
    register(workspace)
    assert (artifacts(workspace) / "requirements.txt").read_text().split() == requirements()
    program = """
        import importlib.util, json
        import mlflow, pandas as pd
        model = mlflow.pyfunc.load_model("models:/digits@challenger")
        drawn = model.predict(pd.DataFrame({"class_label": [3, 1], "seed": [7, 8]}))
        absent = [name for name in ("dvc", "prefect", "great_expectations", "torchmetrics", "rich")
                  if importlib.util.find_spec(name) is None]
        print(json.dumps({"png": list(drawn["png"]), "absent": absent}))
    """
    done = elsewhere(workspace, tmp_path / "elsewhere", program, python=own_environment, VIRTUAL_ENV="")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"dvc", "prefect", "great_expectations", "torchmetrics"} <= set(found["absent"])
    assert pixels(pngs(found["png"])) == drawn_by_the_core(workspace, [3, 1], [7, 8])
