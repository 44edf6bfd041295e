"""A folder with a directory per class."""

import os
from pathlib import Path

from darkroom.data.images import SUFFIXES, Picture, decode
from darkroom.errors import InputError


class Folder:
    """Every PNG, JPEG, WebP and BMP at any depth below the class directories; other files and hidden ones are left out.

    Class directories and files are in plain string order, so "10" comes before "2".
    """

    def __init__(self, root: Path, image_size: int, channels: int, name: str | None = None) -> None:
        if not root.exists():
            raise InputError(f"{root}: no such folder; data.source in params.yaml names it")
        if not root.is_dir():
            raise InputError(f"{root}: not a folder; data.source in params.yaml is a folder with a directory per class")
        self._image_size, self._channels = image_size, channels
        self.name = name or root.resolve().name
        directories = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not directories:
            raise InputError(f"{root}: no class directories; expected a directory per class with images in it")
        self.classes = [_text(directory.name) for directory in directories]
        self.paths: list[str] = []
        self.labels: list[int] = []
        self._files: list[Path] = []
        for label, directory in enumerate(directories):
            files = _images(directory)
            if not files:
                raise InputError(f"{directory}: class directory without images ({', '.join(SUFFIXES)})")
            self._files += files
            self.paths += [_text(file.relative_to(root).as_posix()) for file in files]
            self.labels += [label] * len(files)

    def read(self, index: int) -> Picture:
        """File `index`. Raises InputError when it cannot be read at all; bytes that do not decode are no exception."""
        file = self._files[index]
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        return decode(content, self._image_size, self._channels)


def _images(directory: Path) -> list[Path]:
    found = []
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
        found += [Path(parent) / name for name in visible]
    return sorted(found)


def _text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 are spelt out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
