"""Which average of the weights is sampled from: the one of the training, or the width that has the lowest FID."""

import shutil
from collections.abc import Callable
from itertools import count

import torch

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.extraction import extract
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.labels import stratified_labels
from darkroom.evaluation.reference import Reference
from darkroom.files import write_json
from darkroom.params import SampleParams
from darkroom.training.distributed import Ranks
from darkroom.training.ema import width_name
from darkroom.training.posthoc import Plan, open_snapshots, plan_average, reconstruct, write_model
from darkroom.training.snapshots import DIRECTORY
from darkroom.workspace import Workspace

WIDTHS = (0.025, 0.05, 0.075, 0.10, 0.15, 0.20)  # of power-function averages, in units of the training's length
TRAINED = "trained"
CHOICE_FILE = "choice.json"
_FIRST_SEED = 1 << 40  # far from what anybody lists in sample.seeds


def plans(workspace: Workspace, params: SampleParams) -> list[Plan]:
    """The averages that are tried beside the training's own: those that the snapshots can make, none without `auto`.

    Raises InputError if there are no snapshots.
    """
    if params.ema != "auto":
        return []
    index, found = open_snapshots(workspace.models / DIRECTORY), []
    for width in WIDTHS:
        try:
            found.append(plan_average(index, width))
        except InputError:  # the snapshots are too few for this one
            continue
    return found


def choose_average(
    workspace: Workspace,
    trained: DiffusionModel,
    params: SampleParams,
    candidates: list[Plan],
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
) -> DiffusionModel:
    """The model to sample from. Writes `models/average/`: the weights, unless they are the training's, and the choice.

    Each candidate draws one unguided set with a seed that no score uses, the same for all, so that the choice does not
    flatter the score. `progress` counts images, `num_images` for each candidate and the training's average.
    """
    device = next(trained.network.parameters()).device
    if ranks.is_first:
        shutil.rmtree(workspace.average, ignore_errors=True)
    if not candidates:
        if ranks.is_first:
            write_json(workspace.average / CHOICE_FILE, {"chosen": TRAINED})
        return trained
    seed = next(seed for seed in count(_FIRST_SEED) if seed not in params.seeds)
    models = {TRAINED: lambda: trained} | {
        width_name(plan.width): (lambda plan=plan: _averaged(workspace, trained, plan)) for plan in candidates
    }
    measure = _Measure(workspace, params, seed, ranks, device)
    found = {name: measure(make(), number, progress) for number, (name, make) in enumerate(models.items())}
    best = min(range(len(found)), key=list(found.values()).__getitem__) if ranks.is_first else 0
    best = ranks.agree(best, patient=True)
    name = list(models)[best]
    if not ranks.is_first:
        return models[name]()
    if best > 0:
        write_model(workspace.models, workspace.models / DIRECTORY, candidates[best - 1], workspace.average)
    write_json(workspace.average / CHOICE_FILE, {"chosen": name, "fid": found, "seed": seed})
    listed = ", ".join(f"{width} {fid:.3f}" for width, fid in found.items())
    print(f"sample.ema = auto: {name}, by the FID of {params.num_images} images by seed {seed} ({listed})", flush=True)
    return DiffusionModel.load(workspace.average, device) if best > 0 else trained


class _Measure:
    """FID of the images that a model draws by one seed; on ranks that are not the first NaN."""

    def __init__(
        self, workspace: Workspace, params: SampleParams, seed: int, ranks: Ranks, device: torch.device
    ) -> None:
        self.params, self.seed, self.ranks = params, seed, ranks
        reference = Reference.load(workspace.extractor)
        self.extractor, self.distance = Extractor.load(workspace.extractor, device), reference.distance()
        self.labels = stratified_labels(params.num_images, reference.statistics.class_counts)

    def __call__(self, model: DiffusionModel, number: int, progress: Callable[[int], None] | None) -> float:
        total = self.params.num_images
        share = self.ranks.share(total)
        before, size = number * total, share.stop - share.start

        def show(done: int) -> None:
            if progress:
                progress(before + done * total // max(size, 1))

        images = model.draw(
            self.labels[share],
            self.params.changed(guidance_scale=1.0),
            seed=self.seed,
            index=torch.arange(total)[share],
            batch_size=self.params.batch_size,
            progress=show,
        )
        gathered = self.ranks.gather(images, total)
        if gathered is None:
            return float("nan")
        features = extract(self.extractor, gathered)
        assert features is not None  # one process measures
        return self.distance.fid(features.values)


def _averaged(workspace: Workspace, trained: DiffusionModel, plan: Plan) -> DiffusionModel:
    network = trained.card.build()
    network.load_state_dict(reconstruct(workspace.models / DIRECTORY, plan))
    return DiffusionModel(trained.card, network.to(next(trained.network.parameters()).device))
