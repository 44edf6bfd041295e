"""What the pipeline left on disk, read and checked to be of one training, one lock and one state of the code."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from darkroom.errors import InputError
from darkroom.evaluation.code import code_digest
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.files import read_json
from darkroom.workspace import Workspace
from darkroom.yaml_text import parse_yaml

if TYPE_CHECKING:
    from darkroom.diffusion.card import ModelCard

_AVERAGE_FILE = "ema.json"  # `training.posthoc.RECORD_FILE`, without torch
# What a version is made from: small files, and the weights, which are read here anyway.
_CHECKED = ("models/ema.safetensors", "models/model.json", "models/run.json", "reports/metrics.json")


@dataclass(frozen=True)
class Outputs:
    """What the pipeline left, checked to belong together."""

    card: "ModelCard"
    run: dict[str, Any]  # models/run.json
    record: ScoreRecord
    finite: bool  # all weights
    width: float | None = None  # of the average that `sample.ema` chose; None: the training's own

    @property
    def fingerprint(self) -> str:
        return str(self.run["fingerprint"])


def served_model(workspace: Workspace) -> Path:
    """The directory of the model that is scored and registered. InputError if it is an average of another training."""
    if workspace.served_model == workspace.average:
        _, digest = _read_average(workspace.average / _AVERAGE_FILE)
        card = workspace.models / "model.json"
        trained = str(read_json(card)["weights_digest"]) if card.is_file() else "no model"
        if digest != trained:
            raise InputError(
                f"models/average is of weights {digest[:12]}, models/ has {trained[:12]}; `dvc repro sample` first"
            )
    return workspace.served_model


def read_outputs(workspace: Workspace) -> Outputs:
    """Read model, run and metrics. Raises InputError if one is missing, damaged, or of another training or lock."""
    from darkroom.diffusion.model import DiffusionModel
    from darkroom.evaluation.drawing import is_finite

    try:
        model = DiffusionModel.load(workspace.served_model)
        record = ScoreRecord.read(workspace.metrics_file)
        run = _read_run(workspace.models / "run.json")
    except InputError as error:
        raise InputError(_with_advice(str(error))) from None
    card, width = model.card, None
    trained, scored = {"models/run.json": run["weights_digest"]}, {"reports/metrics.json": record.weights_digest}
    if workspace.served_model == workspace.average:
        width, trained[f"models/average/{_AVERAGE_FILE}"] = _read_average(workspace.average / _AVERAGE_FILE)
        scored["models/average/model.json"] = card.weights_digest
    else:
        trained |= scored | {"models/model.json": card.weights_digest}
    for digests in (trained, scored):
        if len(set(digests.values())) > 1:
            found = ", ".join(f"{name} has {digest[:12]}" for name, digest in sorted(digests.items()))
            raise InputError(f"these are not of one model: {found}; `dvc repro` brings them together")
    if run["fingerprint"] != card.fingerprint:
        raise InputError(
            "models/run.json and models/model.json are of different trainings; `dvc repro` brings them together"
        )
    _check_lock(workspace)
    if record.protocol.code != code_digest():
        raise InputError("the code that draws and measures changed since evaluate ran; `dvc repro` first")
    return Outputs(card, run, record, is_finite(model), width)


def _with_advice(message: str) -> str:
    return message if "dvc repro" in message else f"{message}; `dvc repro` makes it anew"


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = read_json(path)
        missing = {"fingerprint", "weights_digest", "steps"} - set(run)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `dvc repro` makes it") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    if missing:
        raise InputError(f"{path}: {', '.join(sorted(missing))} missing")
    return dict(run)


def _read_average(path: Path) -> tuple[float, str]:
    """Width of the average, and digest of the trained weights that it stands for."""
    try:
        made = read_json(path)
        return float(made["width"]), str(made["trained_weights_digest"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: {error}; `dvc repro sample` makes it") from None


def _check_lock(workspace: Workspace) -> None:
    """Raise InputError if `dvc.lock` was written with other parameters than `params.yaml` has, or for other outputs."""
    path = workspace.root / "dvc.lock"
    if not path.is_file():
        return
    try:
        stages: dict[str, Any] = (parse_yaml(path.read_text(encoding="utf-8")) or {}).get("stages", {})
        # as DVC reads it: the file's values, not the typed models'
        current = parse_yaml(workspace.params_file.read_text(encoding="utf-8"))
        for stage, entry in stages.items():
            for group, values in entry.get("params", {}).get("params.yaml", {}).items():
                if current.get(group) != values:
                    raise InputError(f"params.yaml: {group} changed since stage {stage} ran; `dvc repro` first")
            for out in entry.get("outs", []):
                if out["path"] in _CHECKED and out.get("md5") not in (None, _md5(workspace.root / out["path"])):
                    raise InputError(
                        f"{out['path']} is not what dvc.lock says that stage {stage} wrote; `dvc checkout` brings that "
                        "back, `dvc repro` makes it anew"
                    )
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"dvc.lock: not what DVC writes ({type(error).__name__}); `dvc repro` makes it anew") from None


def _md5(path: Path) -> str:
    """As DVC names a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
