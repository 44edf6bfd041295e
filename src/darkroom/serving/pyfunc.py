"""The model as MLflow loads it: class labels in, PNGs as base64 text out. What it cannot do, it refuses by name.

A model without classes takes rows without columns, one for each image. With a column `seed`, an image depends on its
own row alone.

Runs from the copy of this package inside the registered model, wherever that is loaded; so it may import nothing beyond
the model's own requirements.
"""

import base64
import inspect
import io
import math
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from darkroom.device import choose_device
from darkroom.diffusion.model import DRAW_FILE, DiffusionModel, read_draw_params
from darkroom.diffusion.samplers import network_evaluations
from darkroom.errors import InputError
from darkroom.params_errors import shown
from darkroom.serving.limits import Limits

ARTIFACT = "model"  # the directory with ema.safetensors and model.json
LABEL, SEED = "class_label", "seed"  # columns
OUTPUT = "png"
_SEEDS = "0 to 2**63 - 1"
PARAMS = ("guidance_scale", "sampler", "steps", "seed")


class ImageGenerator(PythonModel):
    """Draws one image per row.

    Without a column `seed`, row i's image depends on its label, i and the parameters, not on other rows; with one, on
    its label, its seed and the other parameters, wherever it is.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights, which have to be those of the model card, and the settings they were measured with.

        The environment decides the device (`DARKROOM_DEVICE`, otherwise a GPU if there is one) and the bounds of a
        request (`serving.limits`). Raises InputError for damaged files and for values of these that cannot be.
        """
        directory = Path(context.artifacts[ARTIFACT])
        self._drawing = threading.Lock()  # a server predicts in threads, and a network on a GPU is for one at a time
        self.limits = Limits.from_environment()
        self.model = DiffusionModel.load(directory, choose_device())
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
        not have, values out of range, seeds given twice over, and requests beyond the limits.
        """
        params = params or {}
        asked_input, asked_params = self._as_asked(model_input, params)
        try:
            _check_names("parameter", asked_params, PARAMS)
            classes = self.model.card.classes
            _check_names("column", asked_input, (LABEL, SEED) if classes else (SEED,))
            missing = [name for name in PARAMS if params.get(name) is None]
            if missing:
                raise InputError(f"parameter {missing[0]!r} is missing")
            _check_rows(model_input)
            self.limits.check_images(len(model_input))
            if classes:
                named = f"0 to {len(classes) - 1} ({', '.join(classes[:20])})"
                labels = _integers(model_input, LABEL, len(classes), named)
            else:
                labels = torch.zeros(len(model_input), dtype=torch.int64)
            seed = _seed(model_input, params["seed"], given="seed" in asked_params)
            settings = self.measured.with_sampler(params["sampler"]).changed(
                steps=params["steps"], guidance_scale=params["guidance_scale"]
            )
            self.model.check_request(labels, settings)
            evaluations = network_evaluations(settings.sampler, settings.steps)
            self.limits.check_work(len(labels), evaluations, guided=settings.guidance_scale not in (0, 1))
            with self._drawing:
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
            expected = ", ".join(allowed)
            if kind == "column" and LABEL not in allowed:
                expected += " or none, as this model has no classes: one row for each image"
            raise InputError(f"unknown {kind} {shown(name)}: expected {expected}")
        if names.count(name) > 1:
            raise InputError(f"{kind} {name!r} is there twice")


def _check_rows(model_input: Any) -> None:
    if not isinstance(model_input, pd.DataFrame):
        raise InputError(f"input of type {type(model_input).__name__}: expected a data frame with a row for each image")


def _seed(model_input: pd.DataFrame, param: Any, *, given: bool) -> int | torch.Tensor:
    """The parameter, or int64 (N,) of the column where there is one."""
    if SEED in model_input:
        if given:
            raise InputError("seed is a column and a parameter: expected one of them")
        return _integers(model_input, SEED, 1 << 63, _SEEDS)
    if not _is_integer(param) or not 0 <= param < 1 << 63:
        raise InputError(f"seed = {shown(param)}: expected {_SEEDS}")
    return int(param)


def _integers(model_input: pd.DataFrame, name: str, below: int, allowed: str) -> torch.Tensor:
    """A column of whole numbers from 0 as int64 (N,). 3.5, 3.0, "3" and true are none, though they can be cast."""
    if name not in model_input:
        raise InputError(f"column {name!r} is missing")
    values = list(model_input[name])
    for row, value in enumerate(values):  # first: one that is missing makes floats of the others
        if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
            raise InputError(f"{name} is missing in row {row}: expected {allowed}")
    for row, value in enumerate(values):
        if not _is_integer(value) or not 0 <= value < below:
            raise InputError(f"{name} = {shown(value)} in row {row}: expected {allowed}")
    return torch.tensor([int(value) for value in values], dtype=torch.int64)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _png(image: torch.Tensor) -> str:
    """A PNG file in base64 of uint8 (C, H, W), grey or RGB."""
    pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
