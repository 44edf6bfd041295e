"""The recipes for published data sets, through the real DVC, on small archives of the exact official forms.

Measuring with Inception takes minutes on a processor, whatever the number of images: `make soak` does that.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from darkroom.files import digest_file
from darkroom.nets.inception import InceptionV3, save_inception
from darkroom.registry.extractor_weights import INCEPTION_FILE
from tests.archives import CIFAR10_NAMES, cifar10, random_pixels, write_imagenet64, write_tar
from tests.pipeline.project import REPOSITORY, STAGES, change, dvc, make_small, metrics, outcomes

pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.slow]


def cifar(root: Path) -> dict[str, object]:
    """Two images per class and batch, of CIFAR-10's ten classes."""
    labels = [i % 10 for i in range(20)]
    batches = [(random_pixels(20, seed=number), labels) for number in range(6)]
    files = cifar10(batches[:5], batches[5], CIFAR10_NAMES)
    write_tar(root / "data" / "raw" / "cifar-10-binary.tar.gz", files)
    change(root, "reference", extractor="classifier")
    return {"checksum": None}  # that of the published archive


def imagenet(root: Path) -> dict[str, object]:
    """Three classes in two batches."""
    labels = [1 + i % 3 for i in range(12)]
    batches = [(random_pixels(12, 64, seed=number), labels) for number in range(3)]
    write_imagenet64(root / "data" / "raw" / "imagenet64", batches[:2], batches[2], ["ant", "bee", "cow"])
    weights = root / ".darkroom" / "extractors" / INCEPTION_FILE
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_inception(InceptionV3(), weights)  # of random weights
    change(root, "reference", inception_sha256=digest_file(weights))
    return {"num_classes": 3}


@pytest.mark.parametrize(
    ("recipe", "build", "counts", "stages"),
    [
        ("cifar10", cifar, (100, 20), STAGES),
        ("imagenet64", imagenet, (24, 12), ["prepare", "validate", "train"]),
        pytest.param("imagenet64", imagenet, (24, 12), STAGES, marks=pytest.mark.soak),
    ],
)
def test_a_recipe_runs_from_the_official_archive_to_the_metrics(tmp_path, recipe, build, counts, stages):
    root = make_small(tmp_path / "project")
    shutil.copy(REPOSITORY / "params" / f"{recipe}.yaml", root / "params.yaml")
    change(root, "data", **build(root))
    change(root, "validate", min_images_per_class=8)
    change(root, "reference", steps=2, channels=[8, 16], features=16, min_accuracy=0.0)
    change(root, "train", steps=2, batch_size=4, lr_warmup_steps=0, ema_snapshots=1)
    change(root, "train.model", channels=[8, 8, 8, 8], num_res_blocks=1, norm_groups=4, head_channels=8)
    change(root, "sample", num_images=20, steps=2, batch_size=20, seeds=[0, 1])
    change(root, "evaluate", kid_subsets=2, kid_subset_size=5)
    subprocess.run(["git", "commit", "-qam", recipe], cwd=root, check=True)

    assert outcomes(dvc(root, "repro", *stages)) == dict.fromkeys(stages, "ran")
    assert outcomes(dvc(root, "repro", *stages)) == dict.fromkeys(stages, "skipped")
    info = json.loads((root / "data" / "prepared" / "dataset.json").read_text())
    assert (info["splits"]["train"], info["splits"]["test"]) == counts
    if stages == STAGES:
        protocol = metrics(root)["protocol"]
        assert protocol["num_images"] == 20
        assert protocol["extractor"] == ("inception" if recipe == "imagenet64" else "classifier")
