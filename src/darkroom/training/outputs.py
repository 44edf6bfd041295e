"""What a finished training leaves for others: weights, their card, snapshots of averages, the record and the curves."""

import csv
import io
import json
from pathlib import Path

from safetensors.torch import save_file

from darkroom.data.dataset import DatasetInfo
from darkroom.diffusion.card import CARD_FILE, WEIGHTS_FILE, ModelCard
from darkroom.files import digest_file, replacing, write_json, write_text
from darkroom.params import TrainParams
from darkroom.training import snapshots
from darkroom.training.ema import DEFAULT_WIDTHS
from darkroom.training.history import History
from darkroom.training.loop import Trained
from darkroom.training.ticks import REPEATABLE

RAW_FILE = "raw.safetensors"  # the weights without averaging
RUN_FILE = "run.json"


def write_model(models: Path, trained: Trained, params: TrainParams, info: DatasetInfo, fingerprint: str) -> ModelCard:
    """Write both sets of weights and `model.json`; return the card."""
    for name, network in ((WEIGHTS_FILE, trained.ema), (RAW_FILE, trained.raw)):
        with replacing(models / name) as temporary:
            save_file({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, temporary)
    card = ModelCard(
        image_size=info.image_size,
        channels=info.channels,
        classes=info.classes,
        unet=params.model,
        schedule=params.schedule,
        prediction=params.prediction,
        label_dropout=params.label_dropout,
        fingerprint=fingerprint,
        data_digest=info.digest,
        weights_digest=digest_file(models / WEIGHTS_FILE),
    )
    write_json(models / CARD_FILE, card.model_dump())
    return card


def collect_snapshots(models: Path, directory: Path, params: TrainParams) -> None:
    """Copy the snapshots from the checkpoint directory to `models/snapshots`. Raises StageFailed if one is missing."""
    steps = snapshots.snapshot_steps(params.steps, params.ema_snapshots)
    snapshots.collect(directory, models / snapshots.DIRECTORY, steps, DEFAULT_WIDTHS)


def write_record(models: Path, trained: Trained, params: TrainParams, card: ModelCard, history: History) -> None:
    """Write `run.json`: what was trained, on what, with what result."""
    record = {
        "fingerprint": card.fingerprint,
        "data_digest": card.data_digest,
        "weights_digest": card.weights_digest,
        "raw_digest": digest_file(models / RAW_FILE),
        "steps": params.steps,
        "images": params.steps * params.batch_size,
        "precision": trained.precision,
        "parameters": sum(parameter.numel() for parameter in trained.ema.parameters()),
        "final_loss": history.rows()[-1]["loss"],
    }
    write_json(models / RUN_FILE, record)


def write_curves(reports: Path, history: History) -> None:
    """Write `history.jsonl` and `loss.csv`, which repeat exactly, and `metrics.jsonl` with speeds and all, for people.

    DVC must not track the last one: a clock in an output would make equal trainings look different.
    """
    rows = history.rows()
    write_text(reports / "metrics.jsonl", _lines(rows))
    rows = [{key: row[key] for key in REPEATABLE} for row in rows]
    write_text(reports / "history.jsonl", _lines(rows))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["step", "loss"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(reports / "loss.csv", table.getvalue())


def _lines(rows: list[dict[str, float | None]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
