"""sample: the evaluation images, always from EMA, and a grid of them to look at. Ranks share the drawing."""

from contextlib import nullcontext
from datetime import timedelta

from darkroom.device import choose_device, waiting_for
from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import StageFailed
from darkroom.evaluation.drawing import draw_samples, is_finite, load_raw, num_draws
from darkroom.evaluation.grid import labelled_grid
from darkroom.evaluation.reference import Statistics
from darkroom.progress import progress
from darkroom.stages.averaging import choose_average, plans
from darkroom.stages.runner import main
from darkroom.training.distributed import joined, rank_device
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `data/samples/` (packed uint8 images with what they were drawn from), `reports/samples.png` and
    `models/average/` (which average of the weights it is, `sample.ema`).

    One set comes from the weights without EMA: it tells what the average is worth.
    """
    params, class_counts = workspace.params().sample, Statistics.read(workspace.extractor).class_counts
    device = rank_device(choose_device())
    trained = DiffusionModel.load(workspace.models, device)
    if not is_finite(trained):
        raise StageFailed("models/ema.safetensors holds values that are not finite")
    raw, candidates = load_raw(workspace.models, trained), plans(workspace, params)
    with joined(device, timeout=timedelta(hours=12)) as ranks:  # they meet after each set
        ranks.check_equal(trained.network.state_dict(), "the weights in models/")
        total = (len(candidates) + 1) * params.num_images
        shown = progress("choosing an average", total, "images", waiting_for(device)) if candidates else nullcontext()
        with shown as advance:
            model = choose_average(workspace, trained, params, candidates, ranks, advance)
        with progress("sampling", num_draws(params, class_counts, raw=True), "images", waiting_for(device)) as advance:
            samples = draw_samples(model, params, class_counts, raw=raw, sharing=ranks, progress=advance)
    if samples is None:  # gathered on rank 0, which writes
        return
    samples.write(workspace.samples)
    labelled_grid(samples.guided, samples.guided_labels, model.card.classes, workspace.reports / "samples.png")


if __name__ == "__main__":
    main(run, ranks=True)
