"""reference: fit the feature extractor and measure the real images with it."""

import torch
from torch import Tensor

from darkroom.data.dataset import load_info, load_split
from darkroom.evaluation.fitting import fit_extractor
from darkroom.evaluation.reference import write_reference
from darkroom.files import replacing_directory
from darkroom.progress import progress
from darkroom.stages.runner import main
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `models/extractor/`: classifier, features of the real images, floor and scale."""
    params, info = workspace.params().reference, load_info(workspace.prepared)

    def split(name: str) -> tuple[Tensor, Tensor]:
        packed = load_split(workspace.prepared, name)
        return torch.tensor(packed.images), torch.tensor(packed.labels)

    train, held_out = split("train"), split("test")
    with replacing_directory(workspace.extractor) as new:
        with progress("reference classifier", params.steps, "steps") as advance:
            extractor = fit_extractor(new, train, held_out, info.classes, info.digest, params, advance)
        found = write_reference(new, extractor, train, held_out, params.seed)
    accuracy = "held-out accuracy" if info.classes else "held-out accuracy in quarter turns"
    print(
        f"{accuracy} {extractor.card.held_out_accuracy:.4f}; floor: FID {found.floor_fid:.3f}"
        f" of {found.floor_num_images} held-out images against {found.num_images}"
    )


if __name__ == "__main__":
    main(run)
