"""evaluate: score the samples, and say what the numbers mean. Ranks share the measuring."""

from datetime import timedelta

import torch

from darkroom.data.dataset import load_split
from darkroom.device import choose_device
from darkroom.evaluation.grid import labelled_grid
from darkroom.evaluation.protocol import Estimate, ScoreRecord, SetScore
from darkroom.evaluation.reference import Reference
from darkroom.evaluation.samples import SampleSet
from darkroom.evaluation.score import Scored, num_measured, score_samples
from darkroom.files import write_json
from darkroom.progress import progress
from darkroom.stages.runner import main
from darkroom.training.distributed import joined, rank_device
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `reports/metrics.json` and `reports/memorisation.png`."""
    params = workspace.params().evaluate
    samples = SampleSet.read(workspace.samples)
    device = rank_device(choose_device())
    with (
        joined(device, timeout=timedelta(hours=2)) as ranks,  # the others wait while the first one scores
        progress("measuring", num_measured(samples), "images") as advance,
    ):
        scored = score_samples(samples, workspace.extractor, params, device=device, sharing=ranks, progress=advance)
    if scored is None:
        return
    _picture_closest(workspace, samples, scored)
    write_json(workspace.metrics_file, scored.record.to_json_dict())
    print(summary(scored.record))


def _picture_closest(workspace: Workspace, samples: SampleSet, scored: Scored) -> None:
    """The samples that are nearest to a training image, above it: whether they are copies is for eyes to see."""
    pairs = scored.closest
    index = Reference.load(workspace.extractor).index
    drawn = samples.unguided.flatten(0, 1)[[pair.sample for pair in pairs]]
    training = load_split(workspace.prepared, "train").images[index[[pair.training for pair in pairs]].numpy()]
    images = torch.cat([drawn, torch.from_numpy(training)])
    rows = torch.arange(2).repeat_interleave(len(pairs))
    labelled_grid(images, rows, ["drawn", "training"], workspace.reports / "memorisation.png")


def summary(record: ScoreRecord) -> str:
    """The scores as a table, between the things that they lie between."""
    floor, scale, guided, protocol = record.floor, record.scale, record.guided, record.protocol
    count = f"{protocol.num_images} x {len(protocol.seeds)}"
    rows = [_real_row(f"held-out real images ({floor.num_images}): the floor", record)]
    rows += [_row(f"samples, guidance 1 ({count})", record.unguided)]
    if guided != record.unguided:  # else it is the set above
        rows += [_row(f"samples, guidance {guided.guidance_scale:g}, as many of each", guided)]
    if record.raw_fid is not None:
        gain = record.raw_fid - record.unguided.fid.seeds[0]
        rows += [(f"the same without EMA, seed {protocol.seeds[0]} (EMA gains {gain:.3f})", f"{record.raw_fid:.3f}")]
    rows += [
        ("real images + noise 0.1", f"{scale.noise_0_1:.3f}"),
        ("real images + noise 0.2", f"{scale.noise_0_2:.3f}"),
        ("real images + noise 0.4", f"{scale.noise_0_4:.3f}"),
        ("class means" if floor.class_accuracy is not None else "mean image", f"{scale.class_means:.3f}"),
        ("pure noise", f"{scale.pure_noise:.3f}"),
    ]
    heads = ("", "FID", "precision", "recall", "near-copies", "class accuracy")
    widths = (52, 20, 11, 8, 13, 16)
    lines = [heads[: 6 if floor.class_accuracy is not None else 5], *rows]
    text = [
        "".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, f"protocol {record.protocol_digest[:12]}; ± is the spread over seeds"])


def _real_row(name: str, record: ScoreRecord) -> tuple[str, ...]:
    floor = record.floor
    cells = (name, f"{floor.fid:.3f}", f"{floor.precision:.3f}", f"{floor.recall:.3f}", "0.010")
    return cells if floor.class_accuracy is None else (*cells, f"{floor.class_accuracy:.4f}")


def _row(name: str, score: SetScore) -> tuple[str, ...]:
    cells = (
        name,
        _with_spread(score.fid, 3),
        f"{score.precision.value:.3f}",
        f"{score.recall.value:.3f}",
        f"{score.memorisation.near_copies:.3f}",
    )
    return cells if score.class_accuracy is None else (*cells, f"{score.class_accuracy.value:.4f}")


def _with_spread(estimate: Estimate, digits: int) -> str:
    spread = "" if estimate.spread is None else f" ± {estimate.spread:.{digits}f}"
    return f"{estimate.value:.{digits}f}{spread}"


if __name__ == "__main__":
    main(run, ranks=True)
