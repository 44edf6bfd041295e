"""The model as MLflow loads it: class labels in, PNGs as base64 text out. What it cannot do, it refuses by name.

A model without classes takes rows without columns, one for each image.

Runs from the copy of this package inside the registered model, wherever that is loaded; so it may import nothing beyond
the model's own requirements.
"""

import base64
import inspect
import io
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from darkroom.diffusion.model import DRAW_FILE, DiffusionModel, read_draw_params
from darkroom.errors import InputError

ARTIFACT = "model"  # the directory with ema.safetensors and model.json
COLUMN = "class_label"
OUTPUT = "png"
PARAMS = ("guidance_scale", "sampler", "steps", "seed")
MAX_IMAGES = 256  # per request


class ImageGenerator(PythonModel):
    """Draws one image per row. Row i's image depends on its label, i and the parameters, not on other rows."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights, which have to be those of the model card, and the settings they were measured with."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        directory = Path(context.artifacts[ARTIFACT])
        self.model = DiffusionModel.load(directory, device)
        settings = read_draw_params(directory)
        if settings is None:
            raise InputError(f"{directory / DRAW_FILE}: no such file")
        self.measured = settings

    @property
    def weights_digest(self) -> str:
        """sha256 of the weights that are loaded, verified against the file."""
        return self.model.card.weights_digest

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """PNG files as base64 text, one per row, in the column `png`.

        Raises MlflowException INVALID_PARAMETER_VALUE (HTTP 400) for labels, columns and parameters that the model does
        not have, values out of range, and more than 256 rows.
        """
        params = params or {}
        asked_input, asked_params = self._as_asked(model_input, params)
        try:
            _check_names("parameter", asked_params, PARAMS)
            classes = self.model.card.classes
            _check_names("column", asked_input, (COLUMN,) if classes else ())
            missing = [name for name in PARAMS if params.get(name) is None]
            if missing:
                raise InputError(f"parameter {missing[0]!r} is missing")
            _check_rows(model_input)
            labels = _labels(model_input) if classes else torch.zeros(len(model_input), dtype=torch.int64)
            seed = params["seed"]
            if not 0 <= seed < 1 << 63:
                raise InputError(f"seed = {seed}: expected 0 to 2**63 - 1")
            settings = self.measured.with_sampler(params["sampler"]).changed(
                steps=params["steps"], guidance_scale=params["guidance_scale"]
            )
            images = self.model.draw(labels, settings, seed=seed)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({OUTPUT: [_png(image) for image in images]}, index=model_input.index, dtype=object)

    def _as_asked(self, model_input: Any, params: dict[str, Any]) -> tuple[Any, Any]:
        """What the caller gave to `PyFuncModel.predict`, before MLflow took out what the signature does not know.

        MLflow drops unknown parameters and columns with a warning in its log, so that a caller who misspells
        `guidance_scale` gets images drawn with the default. It has no setting that refuses them and no hook before that
        point, but the arguments are still there, in the frame of the call in progress. Called in any other way, what
        arrived here is what was asked.
        """
        code = inspect.unwrap(PyFuncModel.predict).__code__
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is code and frame.f_locals["self"].unwrap_python_model() is self:
                return frame.f_locals["data"], frame.f_locals["params"] or {}
            frame = frame.f_back
        return model_input, params


def _check_names(kind: str, given: Any, allowed: tuple[str, ...]) -> None:
    names = list(given.columns) if isinstance(given, pd.DataFrame) else list(given) if isinstance(given, dict) else []
    for name in names:
        if name not in allowed:
            expected = ", ".join(allowed) or "none, as this model has no classes: one row for each image"
            raise InputError(f"unknown {kind} {name!r}: expected {expected}")


def _check_rows(model_input: Any) -> None:
    if not isinstance(model_input, pd.DataFrame):
        raise InputError(f"input of type {type(model_input).__name__}: expected a data frame with a row for each image")
    if len(model_input) > MAX_IMAGES:
        raise InputError(f"{len(model_input)} rows: expected at most {MAX_IMAGES} in one request")


def _labels(model_input: pd.DataFrame) -> torch.Tensor:
    """int64 (N,). Ranges are checked by `DiffusionModel.draw`."""
    if COLUMN not in model_input:
        raise InputError(f"column {COLUMN!r} is missing")
    column = model_input[COLUMN]
    if column.isna().any():
        raise InputError(f"{COLUMN} is missing in row {int(column.isna().to_numpy().argmax())}")
    if len(column) and not pd.api.types.is_integer_dtype(column):
        raise InputError(f"{COLUMN} has type {column.dtype}: expected integers")
    return torch.from_numpy(column.to_numpy(dtype="int64", copy=True))


def _png(image: torch.Tensor) -> str:
    """A PNG file in base64 of uint8 (C, H, W), grey or RGB."""
    pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
