"""The registered model as files: code, safetensors, JSON and a card to read, with exact requirements. No pickle."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import darkroom
from darkroom.diffusion.card import CARD_FILE, WEIGHTS_FILE
from darkroom.diffusion.model import DRAW_FILE
from darkroom.files import read_json, write_json, write_text
from darkroom.params import DrawParams, Params, SampleParams
from darkroom.registry.model_card import PICTURE_FILE, README_FILE, write_card
from darkroom.registry.outputs import Outputs
from darkroom.registry.tracking import import_mlflow
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.models.model import ModelInfo

# What loading and predicting import, and nothing else: a test draws with an environment made from these alone.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "PyYAML", "safetensors", "torch")

# The part of this project that draws; likewise.
CODE = (
    "__init__.py",
    "arithmetic.py",
    "device.py",
    "diffusion",
    "disk.py",
    "errors.py",
    "files.py",
    "nets",
    "params.py",
    "params_errors.py",
    "philox.py",
    "randomness.py",
    "serving",
    "yaml_text.py",
)


def requirements() -> list[str]:
    """`name==version` as installed here, without local labels: `2.13.0+cpu` exists on some machines only."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def signature(classes: list[str], sample: SampleParams) -> "ModelSignature":
    """Labels in, base64 PNGs out; the parameters' defaults are those that the model was evaluated with.

    A column `seed` may come with the labels. Without classes it is the only one, and MLflow has no schema for rows
    without columns: given one, it loses them. So there is none, and MLflow hands on what it is given.

    The columns' type is "any": MLflow's server casts to any other before the model sees a value, 3.5 and "3" to the
    label 3, true to 1, 2**63 to a negative number. The model itself refuses what is no whole number.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    whatever = AnyType()  # type: ignore[no-untyped-call]
    columns = Schema([ColSpec(whatever, "class_label"), ColSpec(whatever, "seed", required=False)])
    return ModelSignature(
        inputs=columns if classes else None,
        outputs=Schema([ColSpec("string", "png")]),
        params=ParamSchema(
            [
                ParamSpec("guidance_scale", "double", float(sample.guidance_scale)),
                ParamSpec("sampler", "string", sample.sampler),
                ParamSpec("steps", "long", sample.steps),
                ParamSpec("seed", "long", sample.seeds[0]),
            ]
        ),
    )


def input_example(classes: list[str]) -> "pd.DataFrame":
    """A row per image: the label of its class, or no column where there are no classes."""
    import pandas as pd

    return pd.DataFrame({"class_label": range(min(3, len(classes)))}) if classes else pd.DataFrame(index=range(3))


def read_validation(workspace: Workspace, data_digest: str) -> dict[str, Any] | None:
    """`reports/validation.json` if it is there and about this data."""
    try:
        report = read_json(workspace.reports / "validation.json")
        return dict(report) if report["dataset"] == data_digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def log_model(
    run_id: str, workspace: Workspace, params: Params, outputs: Outputs, lineage: Mapping[str, str]
) -> tuple["ModelInfo", str]:
    """Log the trained model to the run, on MLflow's current server, with its model card.

    `lineage` are the tags of the version that will be made from it (`lineage.lineage_tags`). Returns MLflow's
    ModelInfo and the card, which is also the run's `model_card.md`.
    """
    mlflow = import_mlflow()
    source, picture = Path(darkroom.__file__).parent, workspace.reports / PICTURE_FILE
    card, record = outputs.card, outputs.record
    pictured = picture.is_file()
    text = write_card(outputs, params, lineage, read_validation(workspace, card.data_digest), pictured=pictured)
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        code, model = Path(directory) / "darkroom", Path(directory) / "model"
        _copy_code(source, code)
        model.mkdir()
        for name in (WEIGHTS_FILE, CARD_FILE):
            shutil.copyfile(workspace.served_model / name, model / name)
        if pictured:
            shutil.copyfile(picture, model / PICTURE_FILE)
        write_text(model / README_FILE, text)
        write_json(model / DRAW_FILE, {name: getattr(params.sample, name) for name in DrawParams.model_fields})
        with _without_bytecode(), mlflow.start_run(run_id=run_id):
            mlflow.log_text(text, "model_card.md")
            info: ModelInfo = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(source / "serving" / "entry.py"),
                artifacts={"model": str(model)},
                code_paths=[str(code)],
                pip_requirements=requirements(),
                signature=signature(card.classes, params.sample),
                input_example=input_example(card.classes),
                tags={"darkroom.weights": card.weights_digest},
                metadata={
                    "classes": card.classes,
                    "weights_digest": card.weights_digest,
                    "protocol_digest": record.protocol_digest,
                },
            )
    return info, text


def _copy_code(source: Path, destination: Path) -> None:
    destination.mkdir()
    for name in CODE:
        if (source / name).is_dir():
            shutil.copytree(source / name, destination / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, destination / name)


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """MLflow imports the entry file where it lies in the package; this Python's cache must not become part of it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
