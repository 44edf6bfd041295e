"""Which form a file or a folder has: told by its name and what lies in it, never by a guess at the images."""

from pathlib import Path

from darkroom.data.checksums import verify
from darkroom.data.sources import Source
from darkroom.errors import InputError

_EXPECTED = (
    "a folder (a directory per class, dataset.json, Parquet, CIFAR or ImageNet-64 batches), a .zip, "
    "a CIFAR .tar.gz or a .parquet file"
)


def open_path(path: Path, checksum: str | None, scratch: Path, name: str | None = None) -> Source:
    """The source at `path`; `name` is what the data set is called, by default the path's last part without its suffix.

    Raises InputError for a path that is missing, has no known form, or has another checksum.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; data.source in params.yaml names it")
    if checksum is not None:
        if not path.is_file():
            raise InputError(f"params.yaml: data.checksum: {path} is a folder; expected null")
        verify(path, checksum)
    name = _plain(name or path.resolve().name)
    if path.is_dir():
        return _open_folder(path, name, scratch)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        from darkroom.data.sources.cifar import open_cifar_archive

        return open_cifar_archive(path, name, scratch)
    if path.suffix == ".zip":
        from darkroom.data.sources.labelled import open_zip

        return open_zip(path, name)
    if path.suffix == ".parquet":
        from darkroom.data.sources.parquet import open_parquet

        return open_parquet(path, [path], name)
    raise InputError(f"{path}: data.source in params.yaml has no known form: expected {_EXPECTED}")


def _open_folder(path: Path, name: str, scratch: Path) -> Source:
    if (path / "dataset.json").is_file():
        from darkroom.data.sources.labelled import open_labelled_folder

        return open_labelled_folder(path, name)
    if files := sorted(path.glob("*_data*.npz")):
        from darkroom.data.sources.imagenet64 import open_imagenet64

        return open_imagenet64(path, files, name, scratch)
    if files := sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        from darkroom.data.sources.parquet import open_parquet

        return open_parquet(path, files, name)
    from darkroom.data.sources.cifar import is_cifar_folder, open_cifar_folder

    if is_cifar_folder(path):
        return open_cifar_folder(path, name)
    from darkroom.data.sources.folder import open_folder

    return open_folder(path, name)


def _plain(name: str) -> str:
    for suffix in (".tar.gz", ".tgz", ".tar", ".zip", ".parquet"):
        name = name.removesuffix(suffix)
    return name
