"""sample: the evaluation images, always from EMA, and a grid of them to look at. Ranks share the drawing."""

from datetime import timedelta

from darkroom.device import choose_device, waiting_for
from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import StageFailed
from darkroom.evaluation.drawing import draw_samples, is_finite, load_raw, num_draws
from darkroom.evaluation.grid import labelled_grid
from darkroom.progress import progress
from darkroom.stages.runner import main
from darkroom.training.distributed import joined, rank_device
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `data/samples/` (packed uint8 images with what they were drawn from) and `reports/samples.png`.

    One set comes from the weights without EMA: it tells what the average is worth.
    """
    params = workspace.params().sample
    device = rank_device(choose_device())
    model = DiffusionModel.load(workspace.models, device)
    if not is_finite(model):
        raise StageFailed("models/ema.safetensors holds values that are not finite")
    raw = load_raw(workspace.models, model)
    with joined(device, timeout=timedelta(hours=12)) as ranks:  # they meet after each set
        ranks.check_equal(model.network.state_dict(), "the weights in models/")
        with progress("sampling", num_draws(params, raw=True), "images", waiting_for(device)) as advance:
            samples = draw_samples(model, params, raw=raw, sharing=ranks, progress=advance)
    if samples is None:  # gathered on rank 0, which writes
        return
    samples.write(workspace.samples)
    labelled_grid(samples.guided, samples.labels, model.card.classes, workspace.reports / "samples.png")


if __name__ == "__main__":
    main(run, ranks=True)
