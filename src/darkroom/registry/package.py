"""The registered model as files: code, safetensors and JSON, with a signature and exact requirements. No pickle."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import darkroom
from darkroom.diffusion.card import CARD_FILE, WEIGHTS_FILE, ModelCard
from darkroom.diffusion.model import DRAW_FILE
from darkroom.files import write_json
from darkroom.params import DrawParams, SampleParams
from darkroom.registry.tracking import import_mlflow

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

# What loading and predicting import, and nothing else: a test imports the package in a process that has only these.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "PyYAML", "safetensors", "torch")


def requirements() -> list[str]:
    """`name==version` as installed here, without local labels: `2.13.0+cpu` exists on some machines only."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def signature(classes: list[str], sample: SampleParams) -> "ModelSignature":
    """Labels in, base64 PNGs out; the parameters' defaults are those that the model was evaluated with.

    Without classes there is no input column: MLflow has no schema for that, and hands on what it is given.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("long", "class_label")]) if classes else None,
        outputs=Schema([ColSpec("string", "png")]),
        params=ParamSchema(
            [
                ParamSpec("guidance_scale", "double", float(sample.guidance_scale)),
                ParamSpec("sampler", "string", sample.sampler),
                ParamSpec("steps", "long", sample.steps),
                ParamSpec("seed", "long", sample.seed),
            ]
        ),
    )


def input_example(classes: list[str]) -> "pd.DataFrame":
    """A row per image: the label of its class, or no column where there are no classes."""
    import pandas as pd

    return pd.DataFrame({"class_label": range(min(3, len(classes)))}) if classes else pd.DataFrame(index=range(3))


def log_package(run_id: str, models: Path, card: ModelCard, sample: SampleParams, tags: dict[str, str]) -> Any:
    """Log the model in `models` (weights and card) to the run, on MLflow's current server; return its ModelInfo."""
    mlflow = import_mlflow()
    source = Path(darkroom.__file__).parent
    with tempfile.TemporaryDirectory(prefix="darkroom-") as directory:
        code, weights = Path(directory) / "darkroom", Path(directory) / "model"
        shutil.copytree(source, code, ignore=shutil.ignore_patterns("__pycache__"))
        weights.mkdir()
        for name in (WEIGHTS_FILE, CARD_FILE):
            shutil.copyfile(models / name, weights / name)
        write_json(weights / DRAW_FILE, {name: getattr(sample, name) for name in DrawParams.model_fields})
        with _without_bytecode(), mlflow.start_run(run_id=run_id):
            return mlflow.pyfunc.log_model(
                name="model",
                python_model=str(source / "serving" / "entry.py"),
                artifacts={"model": str(weights)},
                code_paths=[str(code)],
                pip_requirements=requirements(),
                signature=signature(card.classes, sample),
                input_example=input_example(card.classes),
                tags=tags,
                metadata={"classes": card.classes, "weights_digest": card.weights_digest},
            )


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """MLflow imports the entry file where it lies in the package; this Python's cache must not become part of it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
