"""reference: fit the classifier, and measure the real images with the extractor. Ranks share the measuring."""

import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from darkroom.data.dataset import load_info, load_split
from darkroom.device import choose_device, waiting_for
from darkroom.errors import InputError
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.fitting import fit_extractor, new_card
from darkroom.evaluation.published import PublishedStatistics, read_statistics
from darkroom.evaluation.reference import Statistics, write_reference
from darkroom.files import digest_file, replacing_directory
from darkroom.nets.inception import InceptionV3, load_inception
from darkroom.params import ReferenceParams
from darkroom.progress import progress
from darkroom.registry.extractor_weights import find_inception, find_statistics
from darkroom.stages.runner import main
from darkroom.training.distributed import Ranks, joined, rank_device
from darkroom.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Write `models/extractor/`: classifier (and Inception), features of the real images, floor and scale."""
    params = workspace.params().reference
    device = rank_device(choose_device())
    with joined(device, timeout=timedelta(hours=12)) as ranks:  # the others wait for files and the classifier
        inception, published = _given_files(workspace, params, ranks)
        place = replacing_directory(workspace.extractor) if ranks.is_first else nullcontext(None)
        with place as new:
            _measure(workspace, params, new, ranks, device, inception, published)


def _given_files(
    workspace: Workspace, params: ReferenceParams, ranks: Ranks
) -> tuple[tuple[InceptionV3, str] | None, PublishedStatistics | None]:
    """What the parameters name by digest; on each machine one rank fetches it if need be, before the others look."""
    if ranks.local_rank > 0:
        ranks.wait(patient=True)
    inception = published = None
    if params.extractor == "inception":
        path = find_inception(workspace, params.inception_sha256)
        inception = load_inception(path), digest_file(path)
    if params.published_statistics is not None:
        published = read_statistics(find_statistics(workspace, params.published_statistics))
    if ranks.local_rank == 0:
        ranks.wait(patient=True)
    return inception, published


def _measure(
    workspace: Workspace,
    params: ReferenceParams,
    new: Path | None,
    ranks: Ranks,
    device: torch.device,
    inception: tuple[InceptionV3, str] | None,
    published: PublishedStatistics | None,
) -> None:
    info = load_info(workspace.prepared)
    train, held_out = _split(workspace, "train"), _split(workspace, "test")
    if missing := set(range(len(info.classes))) - set(torch.unique(held_out[1]).tolist()):
        name = info.classes[min(missing)]
        raise InputError(f"data/prepared: the test split has no image of class {name!r}: expected one of each at least")
    if new is not None:
        with progress("reference classifier", params.steps, "steps", waiting_for(device)) as advance:
            extractor = fit_extractor(
                new,
                train,
                held_out,
                info.classes,
                info.digest,
                params,
                inception=inception,
                device=device,
                progress=advance,
            )
    else:
        card = new_card(params, train[0], info.classes, info.digest)
        extractor = Extractor(card, card.build(), inception and inception[0]).to(device)
    ranks.broadcast(extractor.classifier.state_dict().values())
    kept = min(params.max_features, len(train[0]))
    with progress("measuring", len(train[0]) + len(held_out[0]) + 5 * kept, "images") as advance:
        found = write_reference(
            new,
            extractor,
            train,
            held_out,
            params.seed,
            max_features=params.max_features,
            published=published,
            sharing=ranks,
            progress=advance,
        )
    if found is not None:
        print(summary(extractor, found))


def _split(workspace: Workspace, name: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W), read from disk as they are used, and labels int64 (N,)."""
    packed = load_split(workspace.prepared, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the memory map cannot be written to, and is not
        return torch.from_numpy(packed.images), torch.tensor(packed.labels)


def summary(extractor: Extractor, found: Statistics) -> str:
    """One line for the terminal."""
    accuracy = "held-out accuracy" if extractor.card.classes else "held-out accuracy in quarter turns"
    return (
        f"{accuracy} {extractor.card.held_out_accuracy:.4f}; floor: FID {found.floor_fid:.3f}"
        f" of {found.floor_num_images} held-out images against {found.num_images}"
    )


if __name__ == "__main__":
    main(run, ranks=True)
