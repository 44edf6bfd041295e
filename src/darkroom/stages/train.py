"""train: the UNet and its EMA, from the first step or from the last checkpoint of the same fingerprint."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from darkroom.data.dataset import DatasetInfo, load_info, load_split
from darkroom.device import choose_device, memory_explained, waiting_for
from darkroom.errors import Interrupted
from darkroom.params import Params
from darkroom.progress import progress
from darkroom.registry.mirror import S3Mirror
from darkroom.registry.runs import PRECISION_TAG, TrainingLog
from darkroom.stages import environment
from darkroom.stages.following import wait_for_ending
from darkroom.stages.runner import main
from darkroom.training import checkpoints, outputs
from darkroom.training.distributed import Ranks, joined, rank_device
from darkroom.training.fingerprint import training_fingerprint
from darkroom.training.history import History
from darkroom.training.loop import Saving, Trained, train
from darkroom.training.setup import set_up
from darkroom.training.ticks import Tick
from darkroom.workspace import Workspace


@dataclass(frozen=True)
class _Job:
    """One training, as each of its ranks knows it."""

    workspace: Workspace
    params: Params
    info: DatasetInfo
    fingerprint: str
    micro_batch: int | None

    @property
    def directory(self) -> Path:
        """Where its checkpoints are."""
        return self.workspace.checkpoints / self.fingerprint

    def identity(self) -> dict[str, torch.Tensor]:
        """What all ranks have to agree on."""
        digest = torch.frombuffer(bytearray.fromhex(self.fingerprint), dtype=torch.uint8)
        return {"fingerprint": digest, "DARKROOM_MICRO_BATCH": torch.tensor(self.micro_batch or 0)}


def run(workspace: Workspace) -> None:
    """Write what a training leaves in `models/` and `reports/train/`. Of several ranks, the first one reports."""
    params, info = workspace.params(), load_info(workspace.prepared)
    fingerprint = training_fingerprint(params.train, info.digest)
    job = _Job(workspace, params, info, fingerprint, environment.count("DARKROOM_MICRO_BATCH"))
    device = rank_device(choose_device())
    with joined(device) as ranks:
        ranks.check_equal(job.identity(), "parameters, data or code")
        if ranks.is_first:
            _train_and_report(job, device, ranks)
        else:
            _train(job, device, ranks)
        ranks.wait(patient=True)  # until all is written: another machine may go on with it


def _train_and_report(job: _Job, device: torch.device, ranks: Ranks) -> None:
    print("".join(f"warning: {line}\n" for line in job.params.train.warnings()), end="", flush=True)
    settings, history = job.params.train, History(job.directory / "history.jsonl")
    mirror = S3Mirror.from_environment(job.fingerprint)
    shown = progress("training", settings.steps, "steps", waiting_for(device))
    wait_for_ending(job.directory / "lock")
    with shown as advance, checkpoints.locked(job.directory):
        if mirror:
            mirror.pull(job.directory)
        log = TrainingLog.open(job.workspace, job.fingerprint, job.params, {"darkroom.data_digest": job.info.digest})
        status, tags, begun, figures = "FAILED", {}, False, ""

        def on_tick(tick: Tick) -> None:
            nonlocal figures
            row, figures = tick.row(), str(tick)
            history.append(row)
            log.log([{key: value for key, value in row.items() if value is not None}])

        def on_resume(step: int) -> None:
            history.truncate(step)
            print(f"resuming at step {step} of {settings.steps} (fingerprint {job.fingerprint[:12]})", flush=True)

        def on_step(step: int) -> None:  # by time, with the figures of the last tick: two ticks may be minutes apart
            nonlocal begun
            if begun:
                advance(step, figures)
            else:
                begun = True
                advance.begin(step)

        try:
            trained = _train(job, device, ranks, mirror, on_tick, on_resume, on_step)
            _write_outputs(job, trained, history)
            status, tags = "FINISHED", {PRECISION_TAG: trained.precision}
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            log.close(status, tags)


def _train(
    job: _Job,
    device: torch.device,
    ranks: Ranks,
    mirror: S3Mirror | None = None,
    on_tick: Callable[[Tick], None] = lambda tick: None,
    on_resume: Callable[[int], None] = lambda step: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    params = job.params.train
    saving = Saving(
        every_seconds=environment.seconds("DARKROOM_CHECKPOINT_SECONDS", 30.0),
        every_steps=environment.count("DARKROOM_CHECKPOINT_STEPS"),
        mirror=mirror,
    )
    with memory_explained(device, job.micro_batch or params.batch_size // ranks.count):
        network, batches = set_up(params, job.info, load_split(job.workspace.prepared, "train"), device)
        with closing(batches):
            return train(
                network,
                batches,
                params,
                job.directory,
                job.fingerprint,
                on_tick=on_tick,
                on_resume=on_resume,
                on_step=on_step,
                ranks=ranks,
                micro_batch=job.micro_batch,
                saving=saving,
            )


def _write_outputs(job: _Job, trained: Trained, history: History) -> None:
    models, params = job.workspace.models, job.params.train
    card = outputs.write_model(models, trained, params, job.info, job.fingerprint)
    outputs.collect_snapshots(models, job.directory, params)
    outputs.write_record(models, trained, params, card, history)
    outputs.write_curves(job.workspace.train_reports, history)
    print(f"trained {params.steps} steps; EMA weights {card.weights_digest[:12]}", flush=True)


if __name__ == "__main__":
    main(run, ranks=True)
