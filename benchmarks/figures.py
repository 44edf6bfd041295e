"""The figures of docs/diffusion.md: `python -m benchmarks.figures schedules` and `… quality`.

`quality` needs a trained model in `models/` (`dvc repro`): it draws from it with every sampler at several numbers of
network evaluations and measures FID without guidance. What has been measured for these weights is kept in
`docs/quality.json` and not measured again, so it can be interrupted.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from darkroom.diffusion.model import DiffusionModel
from darkroom.diffusion.samplers import network_evaluations
from darkroom.diffusion.schedules import cosine, linear
from darkroom.diffusion.timesteps import MIN_LOG_SNR
from darkroom.evaluation.distances import ReferenceDistance
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.labels import stratified_labels
from darkroom.evaluation.reference import Reference
from darkroom.files import read_json, write_json
from darkroom.workspace import Workspace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "quality.json"
DOCS = ROOT / "docs"

SMOOTH, NOISY = (4, 6, 10, 20, 50), (50, 100, 250, 1000)
STEPS = {
    "ddim": SMOOTH,
    "dpmpp_2m": SMOOTH,
    "dpmpp_2s": SMOOTH,
    "heun": (3, 5, 10, 25),
    "dpmpp_2m_sde": (10, 20, 50),
    "ddpm": NOISY,
    "ddpm_beta": (50, 100, 250),
}
SPACINGS = {"heun": "log_snr"}  # of sigma it has to go in smaller and smaller steps; the others take params.yaml's
NAMES = {
    "ddim": "DDIM",
    "dpmpp_2m": "DPM-Solver++ 2M",
    "dpmpp_2s": "DPM-Solver++ 2S",
    "heun": "Heun, even in λ",
    "dpmpp_2m_sde": "DPM-Solver++ 2M SDE",
    "ddpm": "DDPM, β̃",
    "ddpm_beta": "DDPM, β",
}


def measure(workspace: Workspace, seeds: int) -> Iterator[dict[str, Any]]:
    """FID without guidance of as many images as there are real ones, for each sampler, number of steps and seed."""
    model, params = DiffusionModel.load(workspace.models), workspace.params().sample
    extractor, reference = Extractor.load(workspace.extractor), Reference.load(workspace.extractor)
    distance = ReferenceDistance(reference.features)
    labels = stratified_labels(params.num_images, reference.statistics.class_counts)
    known = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    for seed in range(seeds):
        for sampler, all_steps in STEPS.items():
            for steps in all_steps:
                if steps == 1000 and seed > 0:
                    continue  # minutes each
                spacing = SPACINGS.get(sampler, params.spacing)
                key = {"weights": model.card.weights_digest, "sampler": sampler, "steps": steps, "spacing": spacing}
                key["seed"] = seed
                found = next((row for row in known if key.items() <= row.items()), None)
                if found is None:
                    settings = params.with_sampler(sampler).changed(steps=steps, spacing=spacing, guidance_scale=1.0)
                    images = model.draw(labels, settings, seed=seed, batch_size=params.batch_size)
                    fid = round(distance.fid(extractor(images)), 4)
                    found = key | {"evaluations": network_evaluations(sampler, steps), "fid": fid}
                print(f"{sampler:>13} {steps:5} steps, seed {seed}: FID {found['fid']:.3f}", flush=True)
                yield found


def quality(seeds: int) -> None:
    """Measure, and draw FID against network evaluations."""
    workspace = Workspace.find(ROOT)
    rows: list[dict[str, Any]] = []
    for row in measure(workspace, seeds):
        rows.append(row)
        write_json(RESULTS, {"num_images": workspace.params().sample.num_images, "rows": rows})
    floor = json.loads(workspace.metrics_file.read_text())["floor"]["fid"]

    figure, axes = new_figure(1)
    axis = axes[0]
    for sampler, name in NAMES.items():
        points = sorted({row["evaluations"] for row in rows if row["sampler"] == sampler})
        means = [
            _mean(row["fid"] for row in rows if (row["sampler"], row["evaluations"]) == (sampler, n)) for n in points
        ]
        axis.plot(points, means, marker="o", markersize=4, linewidth=1.4, label=name)
    axis.axhline(floor, color="grey", linewidth=1, linestyle="--")
    axis.text(axis.get_xlim()[1], floor, " held-out\n real images", va="center", fontsize=8, color="grey")
    axis.set_ylim(0.8, 20)  # Heun's at three steps is off any scale
    axis.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="FID, without guidance")
    axis.set_title("Digits: quality against the price of an image")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(DOCS / "quality.svg", metadata={"Date": None})


def schedules() -> None:
    """Draw what the two schedules do to a signal, and where few-step samplers start."""
    figure, axes = new_figure(3)
    t = torch.arange(1000)
    for schedule, name, colour in ((linear(1000), "linear", "tab:blue"), (cosine(1000), "cosine", "tab:orange")):
        axes[0].plot(t, schedule.alpha_bar.sqrt(), color=colour, label=f"{name}, signal √ᾱ")
        axes[0].plot(t, (1 - schedule.alpha_bar).sqrt(), color=colour, linestyle=":", label=f"{name}, noise √(1 − ᾱ)")
        axes[1].plot(t, schedule.betas, color=colour, label=name)
        axes[2].plot(t, schedule.log_snr, color=colour, label=name)
    axes[0].set(title="What x_t consists of", xlabel="t")
    axes[1].set(title="β_t, capped at 0.999", xlabel="t", yscale="log")
    axes[2].set(title="λ_t = ½ log(ᾱ / (1 − ᾱ))", xlabel="t")
    axes[2].axhline(MIN_LOG_SNR, color="grey", linewidth=1, linestyle="--")
    axes[2].text(0, MIN_LOG_SNR - 0.15, f"λ = {MIN_LOG_SNR}: few-step samplers start here", fontsize=8, va="top")
    axes[0].set_ylim(0, 1.45)
    axes[0].legend(fontsize=8, frameon=False, loc="upper center", ncols=2)
    for axis in axes[1:]:
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(DOCS / "schedules.svg", metadata={"Date": None})


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure of the docs: `panels` axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "darkroom", "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.4 * panels if panels > 1 else 7.6, 3.6 if panels > 1 else 4.6), layout="constrained"
    )
    return figure, axes if panels > 1 else [axes]


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("schedules", "quality"))
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="sampling seeds to average over (1)")
    options = parser.parse_args()
    schedules() if options.figure == "schedules" else quality(options.seeds)
