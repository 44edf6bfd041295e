import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.evaluation.drawing import draw_samples, load_raw, num_draws
from darkroom.evaluation.grid import labelled_grid
from darkroom.evaluation.labels import balanced_labels
from darkroom.evaluation.samples import SampleSet
from darkroom.params import SampleParams
from tests.unit.diffusion.test_model import CLASSES, SETTINGS, write_model

DRAW = SETTINGS.changed(sampler="ddim", steps=3)
PARAMS = SampleParams(**DRAW.model_dump(), ema="trained", num_images=23, batch_size=10, seeds=[0, 5])
EVEN = [100] * 10


def test_each_seed_draws_a_set_the_first_one_three_and_they_are_stored_whole(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path))
    raw = load_raw(with_raw(tmp_path), model)
    seen: list[int] = []
    samples = draw_samples(model, PARAMS, EVEN, raw=raw, progress=seen.append)
    assert seen == sorted(seen)
    assert {10, 20, 23, 33} < set(seen)  # whole batches
    assert len(seen) > 4 * 3 * PARAMS.steps  # and each step of one
    assert seen[-1] == num_draws(PARAMS, EVEN, raw=True) == 4 * 23
    labels = balanced_labels(23, 10)
    for place, seed in enumerate((0, 5)):
        expected = model.draw(labels, DRAW.changed(guidance_scale=1.0), seed=seed)
        assert torch.equal(samples.unguided[place], expected)
    assert torch.equal(samples.guided, model.draw(labels, DRAW, seed=0))
    assert torch.equal(samples.raw, raw.draw(labels, DRAW.changed(guidance_scale=1.0), seed=0))
    assert not torch.equal(samples.raw, samples.unguided[0])
    samples.write(tmp_path / "out")
    read = SampleSet.read(tmp_path / "out")
    assert read.params == PARAMS
    assert read.weights_digest == model.card.weights_digest
    for name in ("unguided", "guided", "raw", "labels", "guided_labels"):
        assert torch.equal(getattr(read, name), getattr(samples, name))


def with_raw(directory):
    """Beside the EMA weights of `directory` others, as the ones they are an average of."""
    tensors = load_file(directory / "ema.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, directory / "raw.safetensors")
    return directory


def test_a_model_from_elsewhere_has_no_raw_weights(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path))
    samples = draw_samples(model, PARAMS, EVEN)
    assert samples.raw is None
    samples.write(tmp_path / "out")
    assert SampleSet.read(tmp_path / "out").raw is None


def test_raw_weights_that_are_missing_or_of_another_network_are_refused(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path))
    with pytest.raises(InputError, match=r"raw\.safetensors: no such file"):
        load_raw(tmp_path, model)
    save_file({"weight": torch.zeros(3)}, tmp_path / "raw.safetensors")
    with pytest.raises(InputError, match="does not hold this network"):
        load_raw(tmp_path, model)


def test_a_set_replaces_the_one_before_it_whole_or_not_at_all(tmp_path, monkeypatch):
    model = DiffusionModel.load(write_model(tmp_path))
    first = draw_samples(model, PARAMS, EVEN)
    first.write(tmp_path / "out")
    second = draw_samples(model, PARAMS.model_copy(update={"seeds": [1]}), EVEN)
    monkeypatch.setattr("darkroom.evaluation.samples.write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        second.write(tmp_path / "out")
    assert torch.equal(SampleSet.read(tmp_path / "out").guided, first.guided)
    assert not list(tmp_path.glob(".out.*"))


def test_samples_that_are_not_there_say_what_makes_them(tmp_path):
    with pytest.raises(InputError, match="`dvc repro sample` makes it"):
        SampleSet.read(tmp_path)


def test_a_model_without_classes_draws_one_set_that_stands_for_both(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, label_dropout=0.0, classes=[]))
    seen: list[int] = []
    once = PARAMS.model_copy(update={"guidance_scale": 1.0, "seeds": [0]})
    samples = draw_samples(model, once, [1797], progress=seen.append)
    assert seen[-1] == 23
    assert samples.labels.tolist() == [0] * 23
    assert torch.equal(samples.unguided[0], samples.guided)


def test_a_grid_of_images_without_classes_has_sixteen_in_a_row_in_their_order(tmp_path):
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8) * 6
    labelled_grid(images, torch.zeros(40, dtype=torch.int64), [], tmp_path / "grid.png")
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (24 + 16 * 52 - 4 + 12, 24 + 3 * 52 - 4)
    shades = [picture.getpixel((24 + 52 * (k % 16) + 20, 12 + 52 * (k // 16) + 20))[0] for k in range(40)]
    assert shades == [6 * k for k in range(40)]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_each_class_in_its_own_row(tmp_path, channels):
    images = torch.zeros(40, channels, 8, 8, dtype=torch.uint8)
    labels = balanced_labels(40, 10)
    images[labels == 7] = 200
    labelled_grid(images, labels, CLASSES, tmp_path / "a.png")
    labelled_grid(images, labels, CLASSES, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    row = (picture.height - 24 + 4) / 10
    column = picture.width - 12 - 4 * 52 + 4 + 10  # inside the first image of a row
    shades = [picture.getpixel((column, int(12 + row * k + 20))) for k in range(10)]
    assert shades == [(200, 200, 200) if k == 7 else (0, 0, 0) for k in range(10)]
