"""From what is on disk to the run that records it: what was computed, from which data, parameters and commit."""

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.data.dataset import load_info
from darkroom.errors import InputError
from darkroom.evaluation.protocol import Estimate, ScoreRecord
from darkroom.files import digest_file, digest_json, read_json
from darkroom.params import Params
from darkroom.registry.outputs import Outputs, read_outputs
from darkroom.registry.runs import PRECISION_TAG, ensure_run, write_history
from darkroom.registry.tracking import connect, tracking_uri, unavailable_is_one_line
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCORES = ("fid", "kid", "precision", "recall", "class_accuracy")  # what samples and real images both have

_SYNCED_TAG = "darkroom.synced"


def git_tags(root: Path) -> dict[str, str]:
    """Commit and whether the tree differs from it, as tags; empty outside git or before the first commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        # What a run has made of the commit is in `dvc.lock`, which has a digest of its own among the tags.
        dirty = bool(git("status", "--porcelain", "--", ".", ":(exclude)dvc.lock"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"darkroom.git_commit": commit, "darkroom.git_dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}


def score_figures(record: ScoreRecord) -> dict[str, float]:
    """The figures that there are for people to compare, by the names they have everywhere: `unguided.fid` and so on."""
    figures: dict[str, float | None] = {}
    for name, score in (("unguided", record.unguided), ("guided", record.guided)):
        for key in SCORES:
            estimate: Estimate | None = getattr(score, key)
            if estimate is not None:
                figures |= {f"{name}.{key}": estimate.value, f"{name}.{key}_spread": estimate.spread}
        figures[f"{name}.fid_infinity"] = score.fid_infinity
        figures[f"{name}.near_copies"] = score.memorisation.near_copies
        if score.class_accuracies is not None:
            figures[f"{name}.worst_class_accuracy"] = min(score.class_accuracies)
    figures["raw.fid"] = record.raw_fid
    for key in SCORES:
        figures[f"floor.{key}"] = getattr(record.floor, key)
    return {key: value for key, value in figures.items() if value is not None}


def lineage_tags(workspace: Workspace, params: Params, outputs: Outputs) -> dict[str, str]:
    """Digests that lead back to data, parameters, code and pipeline."""
    card, lock = outputs.card, workspace.root / "dvc.lock"
    return {
        "darkroom.fingerprint": outputs.fingerprint,
        "darkroom.weights": card.weights_digest,
        "darkroom.protocol": outputs.record.protocol_digest,
        "darkroom.average": "trained" if outputs.width is None else f"{outputs.width:g}",
        "darkroom.data_digest": card.data_digest,
        "darkroom.data_source": params.data.source,
        PRECISION_TAG: str(outputs.run.get("precision", params.train.precision)),
        **_data_tags(workspace.prepared, card.data_digest),
        "darkroom.validated": str(is_validated(workspace, card.data_digest)).lower(),
        **({"darkroom.dvc_lock": digest_file(lock)} if lock.is_file() else {}),
        **git_tags(workspace.root),
    }


def is_validated(workspace: Workspace, data_digest: str) -> bool:
    """Whether `reports/validation.json` says that this data passed. Validate writes it for nothing else."""
    try:
        report = read_json(workspace.reports / "validation.json")
        return report["success"] is True and report["dataset"] == data_digest
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _data_tags(prepared: Path, data_digest: str) -> dict[str, str]:
    """How many images each split has, if the prepared data on disk is the data that the model was trained on."""
    try:
        info = load_info(prepared)
    except InputError:
        return {}
    return {"darkroom.data_images": json.dumps(info.splits)} if info.digest == data_digest else {}


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
    candidates = [root / "dvc.lock", root / "params.yaml", workspace.metrics_file]
    candidates += [workspace.reports / "samples.png", workspace.average / "choice.json"]
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
    tags = [RunTag(key, value) for key, value in lineage_tags(workspace, params, outputs).items()]
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
