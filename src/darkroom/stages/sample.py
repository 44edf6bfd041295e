"""sample: the evaluation images, always from EMA, and a grid of them to look at."""

from darkroom.device import choose_device
from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import StageFailed
from darkroom.evaluation.drawing import draw_samples, is_finite
from darkroom.evaluation.grid import labelled_grid
from darkroom.progress import progress
from darkroom.stages.runner import main
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `data/samples/` (packed uint8 images with what they were drawn from) and `reports/samples.png`."""
    params = workspace.params().sample
    model = DiffusionModel.load(workspace.models, choose_device())
    if not is_finite(model):
        raise StageFailed("models/ema.safetensors holds values that are not finite")
    sets = 1 if params.guidance_scale == 1 else 2
    with progress("sampling", sets * params.num_images, "images") as advance:
        samples = draw_samples(model, params, advance)
    samples.write(workspace.samples)
    labelled_grid(samples.guided, samples.labels, model.card.classes, workspace.reports / "samples.png")


if __name__ == "__main__":
    main(run)
