import json

import pytest
import torch
from PIL import Image

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.film import Film
from darkroom.evaluation.pictures import draw_pictures, find_labels
from tests.unit.diffusion.test_model import SETTINGS, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DiffusionModel.load(write_model(tmp_path_factory.mktemp("model")))


def test_a_draw_is_a_grid_a_file_for_each_image_and_a_record(model, tmp_path):
    seen: list[int] = []
    out = tmp_path / "samples"
    images = draw_pictures(model, SETTINGS, [3, 7], 4, 1, out, batch_size=3, progress=seen.append)
    assert seen == list(range(1, 3 * 5 + 1))
    record = json.loads((out / "samples.json").read_text())
    assert record["classes"] == ["3", "7"] * 4
    assert record["settings"]["sampler"] == "dpmpp_2m"
    assert record["weights_digest"] == model.card.weights_digest
    assert sorted(path.name for path in out.iterdir()) == sorted([*record["files"], "grid.png", "samples.json"])
    for name, image in zip(record["files"], images, strict=True):
        assert torch.equal(torch.tensor(list(Image.open(out / name).tobytes())), image.flatten().long())
    assert Image.open(out / "grid.png").mode == "RGB"


def test_images_are_those_that_the_model_draws_for_their_place(model, tmp_path):
    images = draw_pictures(model, SETTINGS, [3, 7], 2, 5, tmp_path / "a", batch_size=3)
    assert torch.equal(images, model.draw(torch.tensor([3, 7, 3, 7]), SETTINGS, seed=5))


def test_a_film_ends_on_the_images_and_shows_every_frame(model, tmp_path):
    out = tmp_path / "samples"
    images = draw_pictures(model, SETTINGS, [3, 7], 3, 1, out, film=True, batch_size=4)
    film = Image.open(out / "film.gif")
    assert (film.n_frames, film.info["loop"]) == (5, 0)
    recorded = Film(5)
    model.draw(torch.tensor([3, 7] * 3), SETTINGS, seed=1, on_step=recorded.record)
    assert torch.equal(recorded.frames()[-1], images)
    film.seek(4)
    last, grid = film.convert("L"), Image.open(out / "grid.png").convert("L")
    assert last.size == grid.size
    difference = torch.tensor(list(last.tobytes())).sub(torch.tensor(list(grid.tobytes()))).abs()
    assert float(difference.float().mean()) < 4  # a GIF has 256 colours
    assert Image.open(out / "film.png").width > 5 * 48


@pytest.mark.parametrize(("steps", "frames"), [(1, 1), (48, 48), (49, 48), (1000, 48)])
def test_a_film_has_at_most_48_frames_and_always_the_last(steps, frames):
    film = Film(steps)
    for step in range(1, steps + 1):
        film.record(step, torch.full((1, 1, 2, 2), step / steps))
    assert len(film.frames()) == frames
    assert film.frames()[-1].max() == 255


def test_a_second_draw_takes_the_place_of_the_first(model, tmp_path):
    draw_pictures(model, SETTINGS, [3, 7], 3, 1, tmp_path / "samples", film=True)
    draw_pictures(model, SETTINGS, [3], 1, 1, tmp_path / "samples")
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0000-3.png", "grid.png", "samples.json"]


def test_files_of_somebody_else_are_never_removed(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files that are not an earlier draw's"):
        draw_pictures(model, SETTINGS, [3], 1, 1, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        draw_pictures(model, SETTINGS, [3], 1, 1, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_draw_leaves_what_was_there(model, tmp_path):
    draw_pictures(model, SETTINGS, [3], 1, 1, tmp_path / "samples")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "samples").iterdir())

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_pictures(model, SETTINGS, [7], 1, 1, tmp_path / "samples", progress=interrupt)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "samples").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_classes_are_found_by_name_before_number():
    classes = ["tench", "7", "great white/shark"]
    assert find_labels(classes, []) == [0, 1, 2]
    assert find_labels(classes, ["2", "tench", "2"]) == [2, 0]
    assert find_labels(classes, ["7"]) == [1]
    for wrong in ("3", "-1", "tenhc"):
        with pytest.raises(InputError, match=f"class '{wrong}': expected a name or a number from 0 to 2 of: tench, 7"):
            find_labels(classes, [wrong])


def test_without_classes_there_is_one_label_and_none_can_be_asked_for():
    assert find_labels([], []) == [0]
    with pytest.raises(InputError, match="class '3': this model was trained without classes; none can be asked for"):
        find_labels([], ["3"])


def test_pictures_without_classes_are_numbered_files_and_rows_of_sixteen(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, label_dropout=0.0, classes=[]))
    settings, out = SETTINGS.changed(guidance_scale=1.0), tmp_path / "samples"
    images = draw_pictures(model, settings, [0], 20, 1, out, film=True)
    assert torch.equal(images, model.draw(torch.zeros(20, dtype=torch.int64), settings, seed=1))
    record = json.loads((out / "samples.json").read_text())
    assert record["classes"] == []
    assert record["files"] == [f"{number:04d}.png" for number in range(20)]
    assert Image.open(out / "grid.png").height == Image.open(out / "film.png").height == 24 + 2 * 52 - 4
