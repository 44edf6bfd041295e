import json

import pytest
import torch
from safetensors.torch import save_file

from darkroom.diffusion.model import DiffusionModel, ModelCard, build_unet
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.params import ScheduleParams
from tests.unit.training.small import PARAMS

CLASSES = [str(digit) for digit in range(10)]


def write_model(directory, label_dropout=0.1, spoil=None):
    torch.manual_seed(0)
    network = build_unet(PARAMS.model, 8, 1, 10, label_dropout)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    if spoil is not None:
        network.conv_out.bias.data.fill_(spoil)
    save_file(network.state_dict(), directory / "ema.safetensors")
    card = ModelCard(
        image_size=8,
        channels=1,
        classes=CLASSES,
        unet=PARAMS.model,
        schedule=ScheduleParams(name="cosine", num_timesteps=100),
        label_dropout=label_dropout,
        fingerprint="f" * 64,
        data_digest="d" * 64,
        weights_digest=digest_file(directory / "ema.safetensors"),
    )
    (directory / "model.json").write_text(card.model_dump_json())
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DiffusionModel.load(write_model(tmp_path_factory.mktemp("model")))


SETTINGS = {"seed": 3, "sampler": "dpmpp_2m", "steps": 5, "guidance_scale": 2.0}


def test_a_model_round_trips_through_its_files(model, tmp_path):
    directory = write_model(tmp_path)
    again = DiffusionModel.load(directory)
    assert again.card == model.card == ModelCard.model_validate_json((directory / "model.json").read_text())
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])


def test_images_are_uint8_and_repeat_by_their_seed(model):
    labels = torch.arange(10)
    first, again = model.draw(labels, **SETTINGS), model.draw(labels, **SETTINGS)
    other = model.draw(labels, **(SETTINGS | {"seed": 4}))
    assert first.dtype == torch.uint8
    assert first.shape == (10, 1, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_image_i_does_not_depend_on_the_batch_it_is_drawn_in(model, sampler, batch_size):
    labels, settings = torch.arange(7), SETTINGS | {"sampler": sampler}
    together = model.draw(labels, batch_size=7, **settings).int()
    split = model.draw(labels, batch_size=batch_size, **settings).int()
    # Matrix products of another size may round differently in the last bit; nothing more.
    assert (together - split).abs().max() <= 1


def test_image_i_is_named_by_its_index_not_by_its_place(model):
    labels = torch.tensor([3, 1, 4])
    reordered = model.draw(labels.flip(0), index=torch.tensor([2, 1, 0]), **SETTINGS).int()
    assert (model.draw(labels, **SETTINGS).int() - reordered.flip(0)).abs().max() <= 1


def test_no_labels_give_no_images(model):
    assert model.draw(torch.tensor([], dtype=torch.int64), **SETTINGS).shape == (0, 1, 8, 8)


def test_progress_counts_finished_images(model):
    seen: list[int] = []
    model.draw(torch.arange(7), batch_size=3, progress=seen.append, **SETTINGS)
    assert seen == [3, 6, 7]


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([0, 10], {}, "class label 10: expected 0 to 9"),
        ([-1], {}, "class label -1: expected 0 to 9"),
        ([0], {"sampler": "euler"}, "sampler = 'euler': expected ddpm or ddim or dpmpp_2m"),
        ([0], {"steps": 0}, "steps = 0: expected 1 to 100"),
        ([0], {"steps": 101}, "steps = 101: expected 1 to 100"),
        ([0], {"guidance_scale": -1.0}, "guidance_scale = -1.0: expected 0 to 100"),
        ([0], {"guidance_scale": float("nan")}, "guidance_scale = nan: expected 0 to 100"),
    ],
)
def test_impossible_requests_name_the_value_and_what_is_allowed(model, labels, changes, message):
    with pytest.raises(InputError) as caught:
        model.draw(torch.tensor(labels), **(SETTINGS | changes))
    assert message in str(caught.value)


def test_guidance_without_label_dropping_is_refused(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, label_dropout=0.0))
    assert model.draw(torch.arange(2), **(SETTINGS | {"guidance_scale": 1.0})).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match="trained without label dropping; only 1"):
        model.draw(torch.arange(2), **SETTINGS)


def test_a_network_that_returns_nan_is_an_error_not_an_image(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, spoil=float("nan")))
    with pytest.raises(FloatingPointError, match="not finite"):
        model.draw(torch.arange(2), **SETTINGS)


def test_weights_that_are_not_the_cards_are_refused(tmp_path):
    write_model(tmp_path)
    path = tmp_path / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"ema\.safetensors: sha256 is .*, model\.json says"):
        DiffusionModel.load(tmp_path)


def test_a_card_with_an_unknown_field_is_refused_by_its_name(tmp_path):
    write_model(tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(card | {"surprise": 1}))
    with pytest.raises(InputError, match=r"model\.json: surprise"):
        DiffusionModel.load(tmp_path)


def test_a_missing_model_says_what_makes_it(tmp_path):
    with pytest.raises(InputError, match="`dvc repro` makes it"):
        DiffusionModel.load(tmp_path)


def test_bf16_samples_stay_close_to_fp32s(model):
    labels = torch.arange(10).repeat(4)
    full = model.draw(labels, **SETTINGS).float()
    half = model.draw(labels, precision="bf16", **SETTINGS).float()
    assert (full - half).square().mean().sqrt() < 0.03 * 255
