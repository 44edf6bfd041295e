"""Drawing for somebody who wants to look: a grid, single images and the film of their denoising, in one directory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.film import Film
from darkroom.evaluation.grid import grid_image, grid_rows, to_image
from darkroom.files import replacing_directory, write_json
from darkroom.params import DrawParams

RECORD_FILE = "samples.json"


def find_labels(classes: list[str], asked: Sequence[str]) -> list[int]:
    """Labels of the classes that were asked for by name or number, each once; none asked are all. Raises InputError.

    A model without classes draws for the label 0 alone, and no class can be asked for.
    """
    if not classes:
        if asked:
            raise InputError(f"class {asked[0]!r}: this model was trained without classes; none can be asked for")
        return [0]
    labels = []
    for text in asked or classes:
        if text in classes:
            labels.append(classes.index(text))
        elif text.isdecimal() and int(text) < len(classes):
            labels.append(int(text))
        else:
            names = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
            raise InputError(f"class {text!r}: expected a name or a number from 0 to {len(classes) - 1} of: {names}")
    return list(dict.fromkeys(labels))


def check_destination(directory: Path) -> None:
    """Raise InputError if writing there would remove anything but pictures of an earlier draw."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; expected a directory or a name that is free")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / RECORD_FILE).is_file():
        raise InputError(f"{directory}: holds files that are not an earlier draw's; choose another directory")


def draw_pictures(
    model: DiffusionModel,
    settings: DrawParams,
    labels: Sequence[int],
    num: int,
    seed: int,
    directory: Path,
    *,
    film: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw `num` images of each label and put them in the place of `directory`, all or none; return them.

    Writes `grid.png`, a file per image, `samples.json`, and with `film` the denoising as `film.gif` and
    `film.png`. `progress` gets the number of finished steps, `steps` for each batch. Image i depends on (weights,
    settings, seed, label i, i) alone. Raises InputError for what cannot be drawn or must not be overwritten.
    """
    check_destination(directory)
    drawn = torch.tensor(labels, dtype=torch.int64).repeat(num)
    recorder, steps_done = Film(settings.steps), 0

    def on_step(step: int, x_0: Tensor) -> None:
        nonlocal steps_done
        steps_done += 1
        if film:
            recorder.record(step, x_0)
        if progress:
            progress(steps_done)

    images = model.draw(drawn, settings, seed=seed, batch_size=batch_size, on_step=on_step)
    classes = model.card.classes
    named = [classes[label] for label in drawn.tolist()] if classes else []
    endings = [f"-{_file_name(name)}" for name in named] if classes else [""] * len(drawn)
    names = [f"{number:04d}{ending}.png" for number, ending in enumerate(endings)]
    record = {
        "classes": named,
        "files": names,
        "seed": seed,
        "settings": settings.model_dump(include=set(DrawParams.model_fields)),
        "weights_digest": model.card.weights_digest,
    }
    with replacing_directory(directory) as new:
        for name, image in zip(names, images, strict=True):
            to_image(image).save(new / name, "PNG")
        rows, titles = grid_rows(drawn, classes)
        grid_image(images, rows, titles).save(new / "grid.png", "PNG", optimize=True)
        if film:
            recorder.write_gif(new / "film.gif", rows, titles)
            recorder.write_strip(new / "film.png", rows, titles)
        write_json(new / RECORD_FILE, record)
    return images


def _file_name(name: str) -> str:
    """A class name without what cannot be in a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
