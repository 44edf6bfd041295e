"""From what is on disk to the run that records it: what was computed, from which data, parameters and commit."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.diffusion.card import ModelCard
from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.drawing import is_finite
from darkroom.evaluation.protocol import ScoreRecord
from darkroom.evaluation.score import code_digest
from darkroom.files import digest_file, digest_json, read_json
from darkroom.params import Params, parse_yaml
from darkroom.registry.runs import ensure_run, write_history
from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SYNCED_TAG = "darkroom.synced"


@dataclass(frozen=True)
class Outputs:
    """What the pipeline left, checked to belong together."""

    card: ModelCard
    run: dict[str, Any]  # models/run.json
    record: ScoreRecord
    finite: bool  # all weights

    @property
    def fingerprint(self) -> str:
        return str(self.run["fingerprint"])


def read_outputs(workspace: Workspace) -> Outputs:
    """Read model, run and metrics. Raises InputError if one is missing, damaged or of another training."""
    try:
        model = DiffusionModel.load(workspace.models)
        record = ScoreRecord.read(workspace.metrics_file)
        run = _read_run(workspace.models / "run.json")
    except InputError as error:
        raise InputError(_with_advice(str(error))) from None
    digests = {
        "models/model.json": model.card.weights_digest,
        "models/run.json": run["weights_digest"],
        "reports/metrics.json": record.weights_digest,
    }
    if len(set(digests.values())) > 1:
        found = ", ".join(f"{name} has {digest[:12]}" for name, digest in digests.items())
        raise InputError(f"these are not of one model: {found}; `dvc repro` brings them together")
    if run["fingerprint"] != model.card.fingerprint:
        raise InputError(
            "models/run.json and models/model.json are of different trainings; `dvc repro` brings them together"
        )
    _check_lock(workspace)
    if record.protocol.code != code_digest():
        raise InputError("the code that draws and measures changed since evaluate ran; `dvc repro` first")
    return Outputs(model.card, run, record, is_finite(model))


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


def _check_lock(workspace: Workspace) -> None:
    """Raise InputError if `params.yaml` is no longer what the pipeline ran with."""
    lock = workspace.root / "dvc.lock"
    if not lock.is_file():
        return
    locked = parse_yaml(lock.read_text(encoding="utf-8")) or {}
    # as DVC reads it: the file's values, not the typed models'
    current = parse_yaml(workspace.params_file.read_text(encoding="utf-8"))
    for stage, entry in locked.get("stages", {}).items():
        for group, values in entry.get("params", {}).get("params.yaml", {}).items():
            if current.get(group) != values:
                raise InputError(f"params.yaml: {group} changed since stage {stage} ran; `dvc repro` first")


def git_tags(root: Path) -> dict[str, str]:
    """Commit and whether the tree differs from it, as tags; empty outside git or before the first commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"darkroom.git_commit": commit, "darkroom.git_dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}


def score_figures(record: ScoreRecord) -> dict[str, float]:
    """The figures that there are for people to compare, by the names they have everywhere: `unguided.fid` and so on."""
    figures: dict[str, float] = {}
    for name, score in (("unguided", record.unguided), ("guided", record.guided), ("floor", record.floor)):
        values = {"fid": score.fid, "kid": score.kid, "class_accuracy": score.class_accuracy}
        figures |= {f"{name}.{key}": value for key, value in values.items() if value is not None}
    return figures


def lineage_tags(workspace: Workspace, outputs: Outputs) -> dict[str, str]:
    """Digests that lead back to data, parameters, code and pipeline."""
    tags = {
        "darkroom.fingerprint": outputs.fingerprint,
        "darkroom.weights": outputs.card.weights_digest,
        "darkroom.data_digest": outputs.card.data_digest,
        "darkroom.protocol": outputs.record.protocol_digest,
        **git_tags(workspace.root),
    }
    lock = workspace.root / "dvc.lock"
    return tags | ({"darkroom.dvc_lock": digest_file(lock)} if lock.is_file() else {})


def sync_run(workspace: Workspace) -> str:
    """Bring the run of the training on disk up to date, making it if the server does not know it; return its id.

    A second call adds nothing. Raises InputError for outputs that are missing or do not belong together, and
    RegistryUnavailable if the server does not answer.
    """
    params, outputs = workspace.params(), read_outputs(workspace)
    client = connect(workspace)
    with unavailable_is_one_line(tracking_uri(workspace)):
        return sync_outputs(client, workspace, params, outputs)


def sync_outputs(client: "MlflowClient", workspace: Workspace, params: Params, outputs: Outputs) -> str:
    """`sync_run` for outputs that have been read and a server that answers."""
    from mlflow.entities import RunTag

    run_id = ensure_run(client, workspace, params, outputs.fingerprint, {})
    root = workspace.root
    candidates = (root / "dvc.lock", root / "params.yaml", workspace.metrics_file, workspace.reports / "samples.png")
    files = {path.name: path for path in candidates if path.is_file()}
    state = digest_json(
        {"history": _history_digest(workspace), **{name: digest_file(path) for name, path in files.items()}}
    )
    run = client.get_run(run_id)
    if run.data.tags.get(_SYNCED_TAG) == state:
        return run_id

    now = int(time.time() * 1000)
    write_history(client, run_id, ((now, row) for row in _history(workspace)))
    _write_final(client, run_id, run.data.metrics, score_figures(outputs.record), int(outputs.run["steps"]), now)
    for path in files.values():
        client.log_artifact(run_id, str(path))
    tags = [RunTag(key, value) for key, value in lineage_tags(workspace, outputs).items()]
    client.log_batch(run_id, tags=tags)
    if run.info.status != "FINISHED":
        client.set_terminated(run_id, status="FINISHED")
    client.set_tag(run_id, _SYNCED_TAG, state)  # last: all of the above is there
    return run_id


def _write_final(
    client: "MlflowClient", run_id: str, there: dict[str, float], figures: dict[str, float], step: int, now: int
) -> None:
    from mlflow.entities import Metric

    changed = [Metric(key, value, now, step) for key, value in figures.items() if there.get(key) != value]
    if changed:
        client.log_batch(run_id, metrics=changed)


def _history(workspace: Workspace) -> list[dict[str, float]]:
    """The rows of `reports/train/history.jsonl`, without the values that were not a number."""
    path = workspace.train_reports / "history.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: value for key, value in row.items() if value is not None} for row in rows]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; `dvc repro` makes it anew") from None


def _history_digest(workspace: Workspace) -> str:
    path = workspace.train_reports / "history.jsonl"
    return digest_file(path) if path.is_file() else ""
