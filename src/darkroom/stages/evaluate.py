"""evaluate: score the samples, and say what the numbers mean."""

from darkroom.evaluation.protocol import ScoreRecord
from darkroom.evaluation.samples import SampleSet
from darkroom.evaluation.score import score_samples
from darkroom.files import write_json
from darkroom.stages.runner import main
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `reports/metrics.json`."""
    record = score_samples(SampleSet.read(workspace.samples), workspace.extractor, workspace.params().evaluate)
    write_json(workspace.metrics_file, record.to_json_dict())
    print(summary(record))


def summary(record: ScoreRecord) -> str:
    """The scores as a table, between the things that they lie between."""
    floor, scale, guided = record.floor, record.scale, record.guided
    classes = floor.class_accuracy is not None
    rows = [
        (f"held-out real images ({floor.num_images}): the floor", floor.fid, floor.class_accuracy),
        (f"samples, guidance 1 ({record.protocol.num_images})", record.unguided.fid, record.unguided.class_accuracy),
        ("real images + noise 0.1", scale.noise_0_1, None),
        ("real images + noise 0.2", scale.noise_0_2, None),
        ("real images + noise 0.4", scale.noise_0_4, None),
        ("class means" if classes else "mean image", scale.class_means, None),
        ("pure noise", scale.pure_noise, None),
    ]
    if guided.guidance_scale != 1:  # else it is the set above
        rows.insert(2, (f"samples, guidance {guided.guidance_scale:g}", guided.fid, guided.class_accuracy))
    lines = [f"{'':42}{'FID':>9}" + (f"{'class accuracy':>17}" if classes else "")]
    for name, fid, accuracy in rows:
        lines.append(f"{name:42}{fid:9.3f}" + ("" if accuracy is None else f"{accuracy:17.4f}"))
    return "\n".join([*lines, f"protocol {record.protocol_digest[:12]}"])


if __name__ == "__main__":
    main(run)
