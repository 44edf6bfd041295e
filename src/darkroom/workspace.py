"""Where things are: one project directory, found from wherever a command is started."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import InputError
from darkroom.params import Params, load_params


@dataclass(frozen=True)
class Workspace:
    """A checkout of the project. Every path that stages, registry and flows agree on is named here, once."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> "Workspace":
        """The directory with `dvc.yaml` and `params.yaml` at or above `start` (default: the working directory).

        A state directory that is missing is made, for this user alone; one that exists keeps its permissions.
        """
        start = (start or Path.cwd()).resolve()
        for directory in (start, *start.parents):
            if (directory / "dvc.yaml").is_file() and (directory / "params.yaml").is_file():
                workspace = cls(directory)
                with contextlib.suppress(OSError):  # whoever needs it will say so
                    workspace.state.mkdir(mode=0o700, parents=True, exist_ok=True)
                return workspace
        raise InputError(f"{start}: not inside a Darkroom project: no dvc.yaml and params.yaml here or above")

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"

    def params(self) -> Params:
        """`params.yaml`, checked."""
        return load_params(self.params_file)

    @property
    def raw(self) -> Path:
        return self.root / "data" / "raw"

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    @property
    def samples(self) -> Path:
        return self.root / "data" / "samples"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def average(self) -> Path:
        """What `sample` made of the weights' averages: the one it chose, or only word that it is the training's."""
        return self.models / "average"

    @property
    def served_model(self) -> Path:
        """The model that was sampled from, scored, and is registered: with `sample.ema` it may be another average."""
        return self.average if (self.average / "model.json").is_file() else self.models

    @property
    def extractor(self) -> Path:
        return self.models / "extractor"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def train_reports(self) -> Path:
        return self.reports / "train"

    @property
    def metrics_file(self) -> Path:
        return self.reports / "metrics.json"

    @property
    def expectations(self) -> Path:
        return self.root / "expectations" / "images.json"

    @property
    def state(self) -> Path:
        """Local state that neither git nor DVC tracks: checkpoints, MLflow's and Prefect's databases.

        `DARKROOM_STATE` moves it; a relative value is relative to the project, wherever a command is started.
        """
        return self.root / (os.environ.get("DARKROOM_STATE") or ".darkroom")

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"
