"""sample: the evaluation images, always from EMA, and a grid of them to look at. Ranks share the drawing."""

from datetime import timedelta

from darkroom.device import choose_device
from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import StageFailed
from darkroom.evaluation.drawing import draw_share, is_finite, sample_set
from darkroom.evaluation.grid import labelled_grid
from darkroom.progress import progress
from darkroom.stages.runner import main
from darkroom.training.distributed import joined, rank_device
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `data/samples/` (packed uint8 images with what they were drawn from) and `reports/samples.png`."""
    params = workspace.params().sample
    device = rank_device(choose_device())
    model = DiffusionModel.load(workspace.models, device)
    if not is_finite(model):
        raise StageFailed("models/ema.safetensors holds values that are not finite")
    sets = 1 if params.guidance_scale == 1 else 2
    with joined(device, timeout=timedelta(hours=12)) as ranks:  # they meet once, when all have drawn
        ranks.check_equal(model.network.state_dict(), "the weights in models/")
        share = ranks.share(params.num_images)
        total, own = sets * params.num_images, sets * (share.stop - share.start)
        with progress("sampling", total, "images") as advance:  # as if the other ranks were as far as this one
            drawn = draw_share(model, params, share, lambda done: advance(total * done // own))
        unguided, guided = (ranks.gather(images, params.num_images) for images in drawn)
    if unguided is None or guided is None:  # gathered on rank 0, which writes
        return
    samples = sample_set(model, params, unguided, guided)
    samples.write(workspace.samples)
    labelled_grid(samples.guided, samples.labels, model.card.classes, workspace.reports / "samples.png")


if __name__ == "__main__":
    main(run, ranks=True)
