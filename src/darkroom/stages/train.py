"""train: the UNet and its EMA, from the first step or from the last checkpoint of the same fingerprint."""

import csv
import io
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from darkroom.data.dataset import DatasetInfo, load_info, load_split
from darkroom.device import choose_device
from darkroom.diffusion.card import CARD_FILE, WEIGHTS_FILE, ModelCard
from darkroom.errors import Interrupted
from darkroom.files import digest_file, replacing, write_json, write_text
from darkroom.params import Params
from darkroom.progress import progress
from darkroom.registry.runs import TrainingLog
from darkroom.stages.runner import main
from darkroom.training import checkpoints
from darkroom.training.fingerprint import training_fingerprint
from darkroom.training.history import History
from darkroom.training.loop import Tick, Trained, train
from darkroom.training.setup import set_up
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `models/*.safetensors`, `models/model.json`, `models/run.json` and `reports/train/`."""
    params, info = workspace.params(), load_info(workspace.prepared)
    device = choose_device()
    fingerprint = training_fingerprint(params.train, info.digest)
    directory = workspace.checkpoints / fingerprint
    with checkpoints.locked(directory):
        log = TrainingLog.open(workspace, fingerprint, params, {"darkroom.data_digest": info.digest})
        status = "FAILED"
        try:
            trained, history = _train(workspace, params, info, device, directory, fingerprint, log)
            _write_outputs(workspace, params, info, fingerprint, trained, history)
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            log.close(status)


def _train(
    workspace: Workspace,
    params: Params,
    info: DatasetInfo,
    device: torch.device,
    directory: Path,
    fingerprint: str,
    log: TrainingLog,
) -> tuple[Trained, History]:
    settings, data = params.train, load_split(workspace.prepared, "train")
    network, batches = set_up(settings, info, data, device)
    history = History(directory / "history.jsonl")
    with progress("training", settings.steps, "steps") as advance:

        def on_tick(tick: Tick) -> None:
            history.append(tick.history())
            log.log([tick.history() | {"images_per_second": tick.images_per_second}])
            advance(tick.step, f"loss {tick.loss:.4f}  {tick.images_per_second:.0f} images/s")

        def on_resume(step: int) -> None:
            history.truncate(step)
            print(f"resuming at step {step} of {settings.steps} (fingerprint {fingerprint[:12]})", flush=True)

        trained = train(
            network,
            batches,
            settings,
            directory,
            fingerprint,
            on_tick=on_tick,
            on_resume=on_resume,
            save_every=float(os.environ.get("DARKROOM_CHECKPOINT_SECONDS", "30")),
        )
    return trained, history


def _write_outputs(
    workspace: Workspace, params: Params, info: DatasetInfo, fingerprint: str, trained: Trained, history: History
) -> None:
    paths = {"ema": workspace.models / WEIGHTS_FILE, "raw": workspace.models / "raw.safetensors"}
    for name, network in (("ema", trained.ema), ("raw", trained.raw)):
        with replacing(paths[name]) as temporary:
            save_file({key: value.cpu() for key, value in network.state_dict().items()}, temporary)
    digests = {name: digest_file(path) for name, path in paths.items()}
    card = ModelCard(
        image_size=info.image_size,
        channels=info.channels,
        classes=info.classes,
        unet=params.train.model,
        schedule=params.train.schedule,
        prediction=params.train.prediction,
        label_dropout=params.train.label_dropout,
        fingerprint=fingerprint,
        data_digest=info.digest,
        weights_digest=digests["ema"],
    )
    write_json(workspace.models / CARD_FILE, card.model_dump())
    rows = history.rows()
    write_text(workspace.train_reports / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["step", "loss"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(workspace.train_reports / "loss.csv", table.getvalue())
    run_record = {
        "fingerprint": fingerprint,
        "data_digest": info.digest,
        "weights_digest": digests["ema"],
        "raw_digest": digests["raw"],
        "steps": params.train.steps,
        "images": params.train.steps * params.train.batch_size,
        "parameters": sum(parameter.numel() for parameter in trained.ema.parameters()),
        "final_loss": rows[-1]["loss"],
    }
    write_json(workspace.models / "run.json", run_record)
    print(f"trained {params.train.steps} steps; EMA weights {digests['ema'][:12]}", flush=True)


if __name__ == "__main__":
    main(run)
