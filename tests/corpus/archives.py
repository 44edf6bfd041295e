"""Bad archives: zip, CIFAR, ImageNet-64 and Parquet."""

import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tests.archives import (
    cifar10,
    hub_features,
    planar,
    png,
    random_pixels,
    write_files,
    write_imagenet64,
    write_parquet,
    write_tar,
)
from tests.corpus.cases import Case, Project

PIXELS, LABELS = random_pixels(12), [i % 2 for i in range(12)]
TRAIN, TEST = (PIXELS[:8], LABELS[:8]), (PIXELS[8:], LABELS[8:])
NAMES = ["ant", "bee"]


def use(project: Project, name: str, split: float | None = None, **data: object) -> Path:
    """The path of a colour source called `name`, which the parameters name from now on."""
    project.change("data", source=f"data/raw/{name}", channels=3, test_fraction=split, **data)
    project.change("validate", modes=["RGB"])
    return project.root / "data" / "raw" / name


def zipped(
    members: Mapping[str, bytes], labels: object = None, method: int = zipfile.ZIP_STORED
) -> Callable[[Project], None]:
    def build(project: Project) -> None:
        path = use(project, "images.zip", 0.25)
        with zipfile.ZipFile(path, "w", method) as archive:
            for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
                archive.writestr(f"{NAMES[label]}/{i}.png", png(pixels))
            for name, content in members.items():
                archive.writestr(name, content)
            if labels is not None:
                archive.writestr("dataset.json", json.dumps({"labels": labels}))

    return build


def damaged_member(project: Project) -> None:
    zipped({"ant/bad.png": png(PIXELS[0] ^ 1)})(project)
    path = project.root / "data" / "raw" / "images.zip"
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"ant/bad.png") + 100] ^= 0xFF
    path.write_bytes(bytes(raw))


def zip_bomb(project: Project) -> None:
    zipped({"ant/bad.png": bytes(1 << 29)}, method=zipfile.ZIP_DEFLATED)(project)


def cut(build: Callable[[Project], None], name: str) -> Callable[[Project], None]:
    def build_and_cut(project: Project) -> None:
        build(project)
        path = project.root / "data" / "raw" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return build_and_cut


def cifar(names: list[str] = NAMES, labels: list[int] = TRAIN[1], **data: object) -> Callable[[Project], None]:
    def build(project: Project) -> None:
        write_tar(use(project, "cifar.tar.gz", **data), cifar10([(TRAIN[0], labels)], TEST, names))

    return build


def escaping_tar(project: Project) -> None:
    files = cifar10([TRAIN], TEST, NAMES) | {"../../../evil.bin": b"x"}
    write_tar(use(project, "cifar.tar.gz"), files)


def absolute_tar(project: Project) -> None:
    entry = tarfile.TarInfo("/etc/evil")
    write_tar(use(project, "cifar.tar.gz"), cifar10([TRAIN], TEST, NAMES), [entry])


def linked_tar(project: Project) -> None:
    entry = tarfile.TarInfo("cifar-10-batches-bin/link")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(use(project, "cifar.tar.gz"), cifar10([TRAIN], TEST, NAMES), [entry])


def pickled_cifar(project: Project) -> None:
    batch = pickle.dumps({b"data": planar(TRAIN[0]), b"labels": TRAIN[1]})
    write_tar(use(project, "cifar-10-python.tar.gz"), {"cifar-10-batches-py/data_batch_1": batch})


def partial_record(project: Project) -> None:
    files = cifar10([TRAIN], TEST, NAMES)
    files["cifar-10-batches-bin/data_batch_1.bin"] += b"\0"
    write_files(use(project, "cifar"), files)


def imagenet(**changes: object) -> Callable[[Project], None]:
    """A good pair of batches but for arrays of the first one."""

    def build(project: Project) -> None:
        root = use(project, "imagenet")
        train, val = (TRAIN[0], [i + 1 for i in TRAIN[1]]), (TEST[0], [i + 1 for i in TEST[1]])
        write_imagenet64(root, [train], val, NAMES)
        arrays = {"data": planar(train[0]), "labels": np.array(train[1])} | changes
        kept = {name: value for name, value in arrays.items() if value is not None}
        np.savez(root / "train_data_batch_1.npz", **kept)  # type: ignore[arg-type]

    return build


def parquet(name: str = "train.parquet", **changes: object) -> Callable[[Project], None]:
    def build(project: Project) -> None:
        arguments: dict[str, object] = {
            "images": [png(pixels) for pixels in PIXELS],
            "labels": LABELS,
            "features": hub_features(NAMES),
        }
        write_parquet(use(project, name, 0.25), **(arguments | changes))  # type: ignore[arg-type]

    return build


def unknown(project: Project) -> None:
    use(project, "images.rar").touch()


IMAGES = [png(pixels) for pixels in PIXELS]
GAP = [["x.png", 3], *([f"{NAMES[label]}/{i}.png", label] for i, label in enumerate(LABELS))]
OTHER = ("picture", "label")
PAIRS = [[f"{NAMES[label]}/{i}.png", label] for i, label in enumerate(LABELS)]
CASES = [
    Case("zip: path traversal", "refused", r"'\.\./\.\./evil\.png' reaches outside", zipped({"../../evil.png": b"x"})),
    Case("zip: absolute path", "refused", r"'/evil\.png' reaches outside", zipped({"/evil.png": b"x"})),
    Case("zip: cut short", "refused", r"images\.zip: no zip file that can be read", cut(zipped({}), "images.zip")),
    Case("zip: damaged member", "listed", r"ant/bad\.png \(damaged: wrong checksum", damaged_member),
    Case("zip: bomb", "listed", r"ant/bad\.png \(536,870,912 bytes, over the limit", zip_bomb),
    Case("zip: image without a label", "refused", r"1 images of the archive have no label", zipped({}, PAIRS[1:])),
    Case("zip: label without images", "refused", r"label 2 has no images", zipped({"x.png": b""}, GAP)),
    Case("zip: label that is a text", "refused", r"row 0: expected \[file, number", zipped({}, [["ant/0.png", "ant"]])),
    Case("CIFAR: wrong checksum", "refused", r"md5 .*data\.checksum declares 0000", cifar(checksum="md5:" + "0" * 32)),
    Case("CIFAR: cut short", "refused", r"cifar\.tar\.gz", cut(cifar(), "cifar.tar.gz")),
    Case("CIFAR: path traversal", "refused", r"evil\.bin", escaping_tar),
    Case("CIFAR: absolute path", "refused", r"/etc/evil", absolute_tar),
    Case("CIFAR: link in the archive", "refused", r"cifar-10-batches-bin/link", linked_tar),
    Case("CIFAR: the pickled version", "refused", r"binary", pickled_cifar),
    Case("CIFAR: part of a record", "refused", r"data_batch_1\.bin", partial_record),
    Case("CIFAR: label beyond the names", "refused", r"data_batch_1\.bin.*7", cifar(labels=[0, 1] * 3 + [0, 7])),
    Case("npz: pickled arrays", "refused", r"train_data_batch_1\.npz", imagenet(data=np.array([{}], dtype=object))),
    Case("npz: wrong shape", "refused", r"train_data_batch_1\.npz", imagenet(data=planar(TRAIN[0])[:, 1:])),
    Case("npz: fewer labels than images", "refused", r"train_data_batch_1\.npz", imagenet(labels=np.array([1, 2]))),
    Case("npz: floating-point pixels", "refused", r"train_data_batch_1\.npz", imagenet(data=planar(TRAIN[0]) / 255)),
    Case("npz: labels from 0", "refused", r"train_data_batch_1\.npz", imagenet(labels=np.array(TRAIN[1]))),
    Case("npz: no labels", "refused", r"train_data_batch_1\.npz", imagenet(labels=None)),
    Case("Parquet: no image column", "refused", r"train\.parquet", parquet(columns=OTHER, features=None)),
    Case("Parquet: null label", "refused", r"train\.parquet.*row 3", parquet(labels=[0, 1, 0, None, *LABELS[4:]])),
    Case("Parquet: label out of range", "refused", r"train\.parquet.*row 3", parquet(labels=[0, 1, 0, 9, *LABELS[4:]])),
    Case("Parquet: image without bytes", "listed", r"\(.*bytes", parquet(images=[*IMAGES[:5], None, *IMAGES[6:]])),
    Case("Parquet: cut short", "refused", r"train\.parquet", cut(parquet(), "train.parquet")),
    Case(
        "file of no known form",
        "refused",
        r"images\.rar: .*no known form",
        unknown,
    ),
]
