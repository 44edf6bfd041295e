import copy
import json
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from darkroom.diffusion.card import ModelCard, build_unet
from darkroom.diffusion.model import DiffusionModel
from darkroom.diffusion.objective import Prediction, Weighting
from darkroom.diffusion.pixels import to_uint8
from darkroom.diffusion.samplers import SAMPLERS, THRESHOLDS
from darkroom.diffusion.timesteps import SPACINGS
from darkroom.errors import InputError
from darkroom.files import digest_file
from darkroom.params import DrawParams, ScheduleParams, TrainParams
from tests.unit.training.small import PARAMS

CLASSES = [str(digit) for digit in range(10)]


def write_model(directory, label_dropout=0.1, spoil=None, prediction="v", classes=CLASSES):
    """A model with random weights. As a prediction of v these give grey images; as one of eps, black and white ones."""
    torch.manual_seed(0)
    network = build_unet(PARAMS.model, 8, 1, len(classes), label_dropout)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if spoil is not None:
        network.conv_out.bias.data.fill_(spoil)
    save_file(network.state_dict(), directory / "ema.safetensors")
    card = ModelCard(
        image_size=8,
        channels=1,
        classes=classes,
        unet=PARAMS.model,
        schedule=ScheduleParams(name="cosine", num_timesteps=100),
        prediction=prediction,
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


SETTINGS = DrawParams(
    sampler="dpmpp_2m",
    steps=5,
    spacing="trailing",
    eta=0.0,
    clipping="static",
    guidance_scale=2.0,
    guidance_interval=None,
    precision="fp32",
)


def test_params_yaml_offers_exactly_what_there_is():
    for field, there in (("sampler", SAMPLERS), ("spacing", SPACINGS), ("clipping", THRESHOLDS)):
        assert sorted(get_args(DrawParams.model_fields[field].annotation)) == sorted(there)
    assert TrainParams.model_fields["prediction"].annotation == Prediction
    assert TrainParams.model_fields["loss_weighting"].annotation == Weighting


def test_a_model_round_trips_through_its_files(model, tmp_path):
    directory = write_model(tmp_path)
    again = DiffusionModel.load(directory)
    assert again.card == model.card == ModelCard.model_validate_json((directory / "model.json").read_text())
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])


def test_images_are_uint8_and_repeat_by_their_seed(model):
    labels = torch.arange(10)
    first, again = model.draw(labels, SETTINGS, seed=3), model.draw(labels, SETTINGS, seed=3)
    other = model.draw(labels, SETTINGS, seed=4)
    assert first.dtype == torch.uint8
    assert first.shape == (10, 1, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_image_i_is_the_same_alone_in_a_batch_of_7_and_in_one_of_128(model, sampler, precision):
    labels, settings = torch.arange(128) % 10, SETTINGS.with_sampler(sampler).changed(precision=precision)
    together = model.draw(labels, settings, seed=3, batch_size=128)
    sevens = model.draw(labels[:21], settings, seed=3, batch_size=7)
    assert torch.equal(sevens, together[:21])
    for i in (0, 5, 127):
        alone = model.draw(labels[i : i + 1], settings, seed=3, index=torch.tensor([i]))
        assert torch.equal(alone[0], together[i])


def test_image_i_is_named_by_its_index_not_by_its_place(model):
    labels = torch.tensor([3, 1, 4])
    reordered = model.draw(labels.flip(0), SETTINGS, seed=3, index=torch.tensor([2, 1, 0]))
    assert torch.equal(model.draw(labels, SETTINGS, seed=3), reordered.flip(0))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_every_image_can_have_a_seed_of_its_own_whatever_the_batch(model, sampler):
    labels, seeds = torch.tensor([3, 1, 4, 1, 1]), torch.tensor([9, 0, 9, 2**63 - 1, 9])
    settings = SETTINGS.with_sampler(sampler)
    together = model.draw(labels, settings, seed=seeds)
    assert torch.equal(model.draw(labels, settings, seed=seeds, batch_size=2), together)
    assert torch.equal(model.draw(labels.flip(0), settings, seed=seeds.flip(0)), together.flip(0))
    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(model.draw(labels[i : i + 1], settings, seed=seed)[0], together[i])
    assert not torch.equal(together[1], together[3])
    assert not torch.equal(together[3], together[4])


def test_equal_seeds_draw_different_images_where_the_indices_differ(model):
    labels, index = torch.zeros(3, dtype=torch.int64), torch.tensor([4, 5, 6])
    images = model.draw(labels, SETTINGS, seed=torch.tensor([3, 3, 3]), index=index)
    assert torch.equal(images, model.draw(labels, SETTINGS, seed=3, index=index))


def test_every_image_can_have_a_guidance_scale_of_its_own(model):
    labels, scales = torch.tensor([3, 1, 4, 1]), torch.tensor([0.0, 1.0, 2.5, 7.0])
    together = model.draw(labels, SETTINGS, seed=3, guidance_scale=scales)
    for i, scale in enumerate(scales.tolist()):
        settings = SETTINGS.changed(guidance_scale=scale)
        alone = model.draw(labels[i : i + 1], settings, seed=3, index=torch.tensor([i]))
        assert torch.equal(alone[0], together[i])


def test_a_guidance_interval_guides_within_it_and_nowhere_else(model):
    def draw(**changes):
        return model.draw(torch.arange(10), SETTINGS.changed(**changes), seed=3).int()

    everywhere, nowhere = draw(guidance_interval=[0.0, 1e9]), draw(guidance_interval=[1e8, 1e9])
    assert torch.equal(everywhere, draw())
    assert torch.equal(nowhere, draw(guidance_scale=1.0))
    some = draw(guidance_interval=[0.3, 3.0])
    assert not torch.equal(some, everywhere)
    assert not torch.equal(some, nowhere)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "log_snr"])
@pytest.mark.parametrize("clipping", ["none", "static", "dynamic"])
def test_spacing_and_clipping_reach_the_sampler(model, spacing, clipping):
    base = model.draw(torch.arange(3), SETTINGS, seed=3)
    other = model.draw(torch.arange(3), SETTINGS.changed(spacing=spacing, clipping=clipping), seed=3)
    assert torch.equal(base, other) == (spacing == "trailing" and clipping == "static")


def test_no_labels_give_no_images(model):
    assert model.draw(torch.tensor([], dtype=torch.int64), SETTINGS, seed=3).shape == (0, 1, 8, 8)


def test_progress_counts_finished_images_and_steps_show_the_estimate(model):
    seen: list[int] = []
    steps: list[tuple[int, tuple[int, ...]]] = []
    estimates = []

    def on_step(step, x_0):
        steps.append((step, tuple(x_0.shape)))
        estimates.append(x_0)

    images = model.draw(torch.arange(7), SETTINGS, seed=3, batch_size=4, progress=seen.append, on_step=on_step)
    assert seen == [4, 7]
    assert steps == [(step, (n, 1, 8, 8)) for n in (4, 3) for step in range(1, 6)]
    assert torch.equal(to_uint8(torch.cat((estimates[4], estimates[9]))), images)


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([0, 10], {}, "class label 10: expected 0 to 9"),
        ([-1], {}, "class label -1: expected 0 to 9"),
        ([0], {"sampler": "euler"}, "sampler = 'euler': expected ddpm or ddpm_beta or ddim or dpmpp_2m"),
        ([0], {"spacing": "even"}, "spacing = 'even': expected trailing or leading or linspace or log_snr"),
        ([0], {"clipping": "hard"}, "clipping = 'hard': expected none or static or dynamic"),
        ([0], {"steps": 0}, "steps = 0: expected at least 1"),
        ([0], {"steps": 101}, "steps = 101: expected 1 to 100"),
        ([0], {"eta": 0.5}, "eta = 0.5: only sampler ddim has it"),
        ([0], {"precision": "fp16"}, "precision = 'fp16': fp16 overflows"),
        ([0], {"guidance_scale": -1.0}, "guidance_scale = -1.0: expected at least 0"),
        ([0], {"guidance_scale": float("nan")}, "guidance_scale = nan: expected a finite number"),
        (
            [0],
            {"guidance_interval": [3.0, 1.0]},
            "guidance_interval = [3.0, 1.0]: expected [low, high] with low < high",
        ),
    ],
)
def test_impossible_requests_name_the_value_and_what_is_allowed(model, labels, changes, message):
    with pytest.raises(InputError) as caught:
        model.draw(torch.tensor(labels), SETTINGS.changed(**changes), seed=3)
    assert message in str(caught.value)


@pytest.mark.parametrize("scale", [-1.0, 101.0, float("nan")])
def test_impossible_scales_of_single_images_are_refused(model, scale):
    with pytest.raises(InputError, match=f"guidance_scale = {scale}: expected 0 to 100"):
        model.draw(torch.arange(2), SETTINGS, seed=3, guidance_scale=torch.tensor([1.0, scale]))


def test_guidance_without_label_dropping_is_refused(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, label_dropout=0.0))
    assert model.draw(torch.arange(2), SETTINGS.changed(guidance_scale=1.0), seed=3).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match="trained without label dropping; only 1"):
        model.draw(torch.arange(2), SETTINGS, seed=3)


def test_a_model_without_classes_draws_image_i_the_same_alone_and_in_any_batch(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, label_dropout=0.0, classes=[]))
    assert model.card.classes == []
    assert model.network.label_embedding is None
    settings = SETTINGS.changed(guidance_scale=1.0)
    together = model.draw(torch.zeros(21, dtype=torch.int64), settings, seed=3)
    assert len(torch.unique(together, dim=0)) == 21
    assert torch.equal(model.draw(torch.zeros(21, dtype=torch.int64), settings, seed=3, batch_size=4), together)
    alone = model.draw(torch.tensor([0]), settings, seed=3, index=torch.tensor([5]))
    assert torch.equal(alone[0], together[5])
    with pytest.raises(InputError, match="class label 1: expected 0, it has no classes"):
        model.draw(torch.tensor([0, 1]), settings, seed=3)
    with pytest.raises(InputError, match=r"guidance_scale = 2\.0: .* only 1"):
        model.draw(torch.tensor([0]), SETTINGS, seed=3)


def test_a_network_that_returns_nan_is_an_error_not_an_image(tmp_path):
    model = DiffusionModel.load(write_model(tmp_path, spoil=float("nan")))
    with pytest.raises(FloatingPointError, match="not finite at timestep 98"):
        model.draw(torch.arange(2), SETTINGS, seed=3)


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


def test_bf16_samples_stay_close_to_fp32s(model, oracle):
    labels = torch.arange(10).repeat(4)
    full = model.draw(labels, SETTINGS, seed=3).float()
    half = model.draw(labels, SETTINGS.changed(precision="bf16"), seed=3).float()
    distance = float((full - half).square().mean().sqrt()) / 255
    oracle("bf16 network, fp32 state, guided DPM++ 2M", "the same in fp32, RMS of the range", distance, 0.02)


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_a_network_that_predicts_something_else_is_understood(tmp_path, prediction):
    model = DiffusionModel.load(write_model(tmp_path, prediction="eps"))
    other = DiffusionModel(model.card.model_copy(update={"prediction": prediction}), model.network)
    alpha_bar = model.schedule.alpha_bar.tolist()
    eps_of = model._predictor([60, 20], torch.arange(3), "fp32")
    understood = other._predictor([60, 20], torch.arange(3), "fp32")

    def converted(x_t, t, labels):  # the same function in the other parametrisation (Salimans & Ho 2022, app. D)
        eps, a = eps_of(x_t, t, labels), alpha_bar[t]
        x_0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
        return x_0 if prediction == "x_0" else a**0.5 * eps - (1 - a) ** 0.5 * x_0

    understood.network = converted
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (60, 20):
        assert torch.allclose(understood(x, t, torch.arange(3)), eps_of(x, t, torch.arange(3)), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_image_i_is_the_same_alone_and_in_a_batch(model, precision, gpu):
    settings = SETTINGS.with_sampler("dpmpp_2m_sde").changed(precision=precision)
    here = DiffusionModel(model.card, copy.deepcopy(model.network).to(gpu))
    labels = torch.arange(64) % 10
    together = here.draw(labels, settings, seed=3)
    assert torch.equal(here.draw(labels, settings, seed=3, batch_size=7), together)
    for i in (0, 5, 63):
        assert torch.equal(here.draw(labels[i : i + 1], settings, seed=3, index=torch.tensor([i]))[0], together[i])
