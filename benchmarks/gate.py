"""What the gate refuses, and how far trainings scatter.

    python -m benchmarks.gate scatter --write    # trains the default recipe with five seeds, and scores each: an hour
    python -m benchmarks.gate power --write      # simulates verdicts: docs/power.svg and the table of docs/scores.md

`scatter` needs the data and the extractor of `dvc repro` and keeps what it trained in `.darkroom/scatter`, so it can be
interrupted. `power` takes the deviations from what `scatter` measured, other figures from the record of `dvc repro`.
"""

import argparse
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures import DOCS, ROOT, new_figure
from benchmarks.machine import describe
from darkroom.data.dataset import load_info
from darkroom.evaluation.protocol import Estimate, ScoreRecord
from darkroom.files import read_json, write_json, write_text
from darkroom.params import GatePolicy
from darkroom.registry.gate import Evidence, decide
from darkroom.training.fingerprint import training_fingerprint
from darkroom.workspace import Workspace

RESULTS = ROOT / "benchmarks" / "results" / "gate"
TRAININGS = 5
TRIES = 20_000  # verdicts for each point of the curve
SLIDES, SLIDE, CHALLENGERS = 400, 0.05, 30
WORSE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # in deviations of the FID of one set
WORLDS = {"samples": "samples scatter alone", "trainings": "trainings scatter as measured, and the margin knows"}
SOUND = Evidence(validated=True, seconds_per_image=0.0)

Draw = Callable[[float, random.Random], ScoreRecord]


def scatter() -> dict[str, Any]:
    """Train the recipe with several seeds and score the training's own average of each; the `summary`."""
    from darkroom.diffusion.model import DiffusionModel
    from darkroom.evaluation.rescore import protocol_of, score_model
    from darkroom.stages import train

    project = Workspace.find(ROOT)
    params, records = project.params(), []
    protocol = protocol_of(project.extractor, params.sample, params.evaluate).digest
    for seed in range(TRAININGS):
        workspace = _workspace(project, seed)
        if not (workspace.models / "model.json").is_file():
            train.run(workspace)
        if not workspace.metrics_file.is_file() or read_json(workspace.metrics_file)["protocol_digest"] != protocol:
            model = DiffusionModel.load(workspace.models)
            record = score_model(model, project.extractor, params.sample, params.evaluate)
            write_json(workspace.metrics_file, record.to_json_dict())
        records.append(ScoreRecord.read(workspace.metrics_file))
        print(f"training {seed}: FID {records[-1].unguided.fid.value:.3f}", flush=True)
    return summary(records) | {"machine": describe()}


def summary(records: Sequence[ScoreRecord]) -> dict[str, Any]:
    """What the records of several trainings say: how far they scatter, beyond what samples of their own explain."""
    fids = [record.unguided.fid for record in records]
    accuracies = [record.unguided.class_accuracy for record in records if record.unguided.class_accuracy]
    mean = statistics.mean(fid.value for fid in fids)
    own, between = parts_of_variance(fids)
    return {
        "class_accuracy": [accuracy.value for accuracy in accuracies],
        "class_accuracy_scatter": math.sqrt(parts_of_variance(accuracies)[1]) if accuracies else None,
        "deviation_of_own_samples": math.sqrt(own),
        "fid": [fid.value for fid in fids],
        "fid_of_seeds": [fid.seeds for fid in fids],
        "deviation_of_one_set": [record.unguided.fid_deviation for record in records],
        "seeds": len(fids[0].seeds),
        "num_images": records[0].protocol.num_images,
        "mean": mean,
        "retraining_scatter": math.sqrt(between) / mean,
        "protocol": records[0].protocol_digest,
    }


def parts_of_variance(scores: Sequence[Estimate]) -> tuple[float, float]:
    """The variances of one set's own samples, and of the trainings.

    A seed draws the same noise for every training, so part of what samples scatter is common to all and no difference
    between them. What is left when trainings and seeds have been taken out is the samples' own part (analysis of
    variance with two factors).
    """
    values = [score.value for score in scores]
    by_seed = [statistics.mean(each) for each in zip(*(score.seeds for score in scores), strict=True)]
    mean = statistics.mean(values)
    left = [
        one - score.value - common + mean for score in scores for one, common in zip(score.seeds, by_seed, strict=True)
    ]
    own = sum(value**2 for value in left) / max((len(scores) - 1) * (len(by_seed) - 1), 1)
    return own, max(0.0, statistics.variance(values) - own / len(by_seed))


def _workspace(project: Workspace, seed: int) -> Workspace:
    content = yaml.safe_load(project.params_file.read_text(encoding="utf-8"))
    content["train"]["seed"] = seed
    params = project.params().train.model_copy(update={"seed": seed})
    fingerprint = training_fingerprint(params, load_info(project.prepared).digest)
    root = project.state / "scatter" / fingerprint[:12]
    write_text(root / "params.yaml", yaml.safe_dump(content))
    workspace = Workspace(root)
    workspace.prepared.parent.mkdir(parents=True, exist_ok=True)
    if not workspace.prepared.exists():
        workspace.prepared.symlink_to(project.prepared.resolve())
    return workspace


def power(measured: dict[str, Any], policy: GatePolicy, record: ScoreRecord, seeds: int) -> dict[str, Any]:
    """What the gate does with models whose trainings scatter as measured, and with ones whose samples alone do.

    `refused`: the share of models that are worse by so many deviations of the FID of one set; `slides`: where thirty
    challengers end that are 5 % worse each; `false_refusals`: the share of thirty equally good ones. The policy's
    ceilings are open, and its scatter is that of the trainings.
    """
    deviation = statistics.mean(measured["deviation_of_one_set"]) / measured["mean"]
    found: dict[str, Any] = {"deviation": deviation, "margin": policy.margin, "seeds": seeds}
    for name, scatter in (("samples", 0.0), ("trainings", measured["retraining_scatter"])):
        open_policy = opened(policy, scatter)
        draw = drawing(record, deviation, scatter, seeds)
        slides = {
            name: [slide(open_policy, draw, random.Random(number), bar=bar) for number in range(SLIDES)]
            for name, bar in (("mean", True), ("without_bar", False))
        }
        found[name] = {
            "scatter": scatter,
            "refused": {str(worse): refused(open_policy, draw, 1 + worse * deviation) for worse in WORSE},
            "slides": {name: statistics.mean(ends) for name, ends in slides.items()},
            "false_refusals": beside_many(open_policy, draw),
        }
    return found


def opened(policy: GatePolicy, scatter: float) -> GatePolicy:
    """The policy for a recipe whose trainings scatter so, without ceilings of FID and time."""
    return policy.model_copy(
        update={"max_fid": math.inf, "max_seconds_per_image": math.inf, "retraining_scatter": scatter}
    )


def drawing(record: ScoreRecord, deviation: float, scatter: float, seeds: int) -> Draw:
    """`draw(quality, random)`: a record of a training whose recipe has this FID, of images drawn for `seeds` seeds."""

    def draw(quality: float, source: random.Random) -> ScoreRecord:
        trained = quality * (1 + scatter * source.gauss())
        values = [trained * (1 + deviation * source.gauss()) for _ in range(seeds)]
        fid = Estimate(value=statistics.mean(values), spread=None, low=None, high=None, seeds=values)
        unguided = record.unguided.model_copy(update={"fid": fid, "fid_deviation": deviation * trained})
        return record.model_copy(update={"unguided": unguided})

    return draw


def refused(policy: GatePolicy, draw: Draw, quality: float) -> float:
    """The share of challengers of this quality that a champion of quality 1 keeps out."""
    source = random.Random(0)
    tries = [decide(policy, draw(quality, source), draw(1.0, source), SOUND).passed for _ in range(TRIES)]
    return 1 - statistics.mean(tries)


def slide(policy: GatePolicy, draw: Draw, source: random.Random, *, bar: bool) -> float:
    """The quality of the champion after thirty challengers, each 5 % worse than the one that serves."""
    quality, champion = 1.0, draw(1.0, source)
    best = champion
    for _ in range(CHALLENGERS):
        challenger = draw(quality * (1 + SLIDE), source)
        if decide(policy, challenger, champion, SOUND, best if bar else None).passed:
            quality, champion = quality * (1 + SLIDE), challenger
            best = min(best, champion, key=lambda record: record.unguided.fid.value)
    return quality


def beside_many(policy: GatePolicy, draw: Draw) -> float:
    """The share of equally good challengers that is refused, over thirty tries each, the best of them the bar."""
    outcomes = []
    for number in range(SLIDES):
        source = random.Random(number)
        champion = best = draw(1.0, source)
        for _ in range(CHALLENGERS):
            challenger = draw(1.0, source)
            passed = decide(policy, challenger, champion, SOUND, best).passed
            outcomes.append(passed)
            if passed:
                champion = challenger
                best = min(best, champion, key=lambda record: record.unguided.fid.value)
    return 1 - statistics.mean(outcomes)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The result for a person."""
    for name in WORLDS:
        world = found[name]
        yield f"{name} scatter, one set by {found['deviation']:.1%} of FID, a training by {world['scatter']:.1%}:"
        yield "  refused: " + ", ".join(f"{share:.1%} at {worse}" for worse, share in world["refused"].items())
        end, before = world["slides"]["mean"], world["slides"]["without_bar"]
        yield f"  thirty slides of 5 % end at {end:.2f}; without the best champion at {before:.2f}"
        yield f"  of thirty equally good challengers {world['false_refusals']:.2%} are refused"


def draw_power(found: dict[str, Any], path: Path) -> None:
    """The power curve."""
    figure, (axis,) = new_figure(1)
    for name, label in WORLDS.items():
        points = {float(worse): share for worse, share in found[name]["refused"].items()}
        axis.plot(list(points), list(points.values()), marker="o", markersize=4, label=label)
    axis.axhline(0.02, color="grey", linewidth=1, linestyle=":")
    axis.text(3.9, 0.03, "2 %", fontsize=8, color="grey")
    axis.set(xlabel="how much worse the challenger is, in deviations of the FID of one set", ylabel="share refused")
    axis.set_title("What the gate refuses")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or simulate, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scatter", "power"))
    parser.add_argument("--write", action="store_true", help="keep figures and picture")
    options = parser.parse_args(arguments)
    if options.what == "scatter":
        found = scatter()
        print(f"retraining scatter: {found['retraining_scatter']:.1%} of FID {found['mean']:.3f}")
        if found["class_accuracy"]:
            print(f"class accuracy: {found['class_accuracy_scatter']:.2%} beyond its samples")
    else:
        project = Workspace.find(ROOT)
        params, record = project.params(), ScoreRecord.read(project.metrics_file)
        found = power(read_json(RESULTS / "scatter.json"), params.registry.gate, record, len(params.sample.seeds))
        print(*lines(found), sep="\n")
        if options.write:
            draw_power(found, DOCS / "power.svg")
    if options.write:
        write_json(RESULTS / f"{options.what}.json", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
