"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their official binary form: the archive, or the folder in it."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from darkroom.data.sources import TEST, TRAIN, Source
from darkroom.data.sources.reading import file_entry, identity
from darkroom.data.sources.records import RecordFile, record_source
from darkroom.data.sources.unpacking import unpack, unpacked_name
from darkroom.errors import InputError
from darkroom.files import replacing_directory

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_NAMES = 1 << 20  # bytes of the file with the classes' names
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class _Layout:
    form: str
    directory: str
    train: tuple[str, ...]  # at least one of them is needed
    test: str
    names: str
    label_bytes: int  # before a record's pixels; the last one counts
    pickled: str  # directory of the pickled python version
    archive: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.names)


_LAYOUTS = (
    _Layout(
        form="CIFAR-10",
        directory="cifar-10-batches-bin",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        label_bytes=1,
        pickled="cifar-10-batches-py",
        archive="cifar-10-binary.tar.gz",
    ),
    _Layout(
        form="CIFAR-100",
        directory="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        label_bytes=2,  # coarse, fine
        pickled="cifar-100-python",
        archive="cifar-100-binary.tar.gz",
    ),
)


def open_cifar_archive(path: Path, name: str, scratch: Path) -> Source:
    """The source in `cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz`, 32x32 RGB; fine labels of CIFAR-100.

    The batches are unpacked to `scratch` once; nothing else that the archive holds is. Raises InputError for a damaged
    archive, members that are links or reach outside, the pickled version, records cut off and labels without a name.
    """
    unpacked = scratch / unpacked_name(path)
    if not unpacked.is_dir():
        scratch.mkdir(parents=True, exist_ok=True)
        with replacing_directory(unpacked) as directory:
            _unpack(path, directory)
    layout = next(layout for layout in _LAYOUTS if (unpacked / layout.test).is_file())
    return _open(layout, unpacked, str(path), name, f"{layout.form} archive", [file_entry(path)])


def open_cifar_folder(path: Path, name: str) -> Source:
    """The same from the folder `cifar-10-batches-bin` or `cifar-100-binary`, or one that holds it."""
    for layout in _LAYOUTS:
        for folder in (path, path / layout.directory):
            if any((folder / file).is_file() for file in (*layout.train, layout.test)):
                known = [file_entry(folder / file) for file in layout.files if (folder / file).is_file()]
                return _open(layout, folder, str(folder), name, f"{layout.form} folder", known)
    for layout in _LAYOUTS:
        for folder in (path, path / layout.pickled):
            if (folder / "data_batch_1").is_file() or (folder / "meta").is_file():
                raise _pickled(str(folder), layout)
    raise InputError(f"{path}: no CIFAR batches; expected {_expected()}")


def is_cifar_folder(path: Path) -> bool:
    """Whether `open_cifar_folder` has something to say about a folder."""
    inside = [file for layout in _LAYOUTS for file in (*layout.train, layout.test, layout.directory, layout.pickled)]
    return any((path / file).exists() for file in (*inside, "data_batch_1"))


def _open(layout: _Layout, folder: Path, where: str, name: str, form: str, known: list[tuple[object, ...]]) -> Source:
    classes = _class_names(folder / layout.names, f"{where}: {layout.names}")
    files, labels = [], []
    for file in (*layout.train, layout.test):
        if (folder / file).is_file():
            found = _labels(folder / file, f"{where}: {file}", layout.label_bytes, classes)
            labels.append(found)
            files.append(
                RecordFile(
                    path=str(folder / file),
                    stem=file.removesuffix(".bin"),
                    split=TEST if file == layout.test else TRAIN,
                    offset=0,
                    size=layout.label_bytes + _PIXELS,
                    skip=layout.label_bytes,
                    count=len(found),
                )
            )
    if {file.split for file in files} != {TRAIN, TEST}:
        missing = layout.test if files[0].split == TRAIN else layout.train[0]
        raise InputError(f"{where}: {missing} is missing; expected {_expected()}")
    return record_source(name, form, classes, files, labels, _SIDE, identity(form, known))


def _class_names(path: Path, where: str) -> list[str]:
    """A name per line; empty lines are left out."""
    if not path.is_file():
        raise InputError(f"{where}: missing; expected the classes' names, one a line")
    if path.stat().st_size > _MAX_NAMES:
        raise InputError(f"{where}: {path.stat().st_size:,} bytes; expected the classes' names, one a line")
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read: {error}") from None
    names = [stripped for line in names if (stripped := line.strip())]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{where}: expected different names of classes, one a line")
    return names


def _labels(path: Path, where: str, label_bytes: int, classes: list[str]) -> NDArray[np.int32]:
    size, record = path.stat().st_size, label_bytes + _PIXELS
    if size % record or not size:
        raise InputError(f"{where}: {size:,} bytes; record {size // record} is cut off, records have {record:,} bytes")
    try:
        records = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, record)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    labels = records[:, label_bytes - 1].astype(np.int32)
    if len(wrong := np.flatnonzero(labels >= len(classes))):
        row = int(wrong[0])
        raise InputError(f"{where}: record {row}: label {labels[row]}; expected 0 to {len(classes) - 1}")
    return labels


def _unpack(path: Path, directory: Path) -> None:
    """Copy the batches of the one data set in a tar to `directory`, and look at every other member's name and kind."""
    wanted = {f"{layout.directory}/{file}": layout for layout in _LAYOUTS for file in layout.files}
    found: dict[str, _Layout] = {}
    try:
        with _decompressed(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = _safe_name(path, member)
                    for layout in _LAYOUTS:
                        if name == layout.pickled or name.startswith(f"{layout.pickled}/"):
                            raise _pickled(str(path), layout)
                    if name not in wanted or not member.isreg():
                        continue
                    if name in found:
                        raise InputError(f"{path}: member {name} is there twice")
                    found[name] = wanted[name]
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file
                    unpack(content, member.size, directory / PurePosixPath(name).name, f"{path}: member {name}")
            while stream.read(1 << 20):  # the checksum comes at the end
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: no tar file that can be read, or not all of one: {error}") from None
    layouts = {layout.form: layout for layout in found.values()}
    if len(layouts) != 1:
        raise InputError(f"{path}: {' and '.join(layouts) or 'no CIFAR batches'} in it; expected {_expected()}")
    layout = next(iter(layouts.values()))
    if not (directory / layout.test).is_file():
        raise InputError(f"{path}: {layout.directory}/{layout.test} is missing; expected {_expected()}")


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    # tarfile's own decompression of streams checks neither the checksum nor the end.
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        if not compressed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream  # type: ignore[misc]


def _safe_name(path: Path, member: tarfile.TarInfo) -> str:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        raise InputError(f"{path}: member {member.name!r} reaches outside the archive; refused")
    if not (member.isreg() or member.isdir()):
        raise InputError(f"{path}: member {member.name!r} is a link or a device; refused, expected files")
    return "/".join(parts)


def _pickled(where: str, layout: _Layout) -> InputError:
    return InputError(
        f"{where}: the python version of {layout.form} is pickled, and a pickle can run any code; expected the "
        f"binary version, {layout.archive}"
    )


def _expected() -> str:
    return " or ".join(
        f"{layout.directory}/ with {layout.train[0]}, {layout.test} and {layout.names}" for layout in _LAYOUTS
    )
