"""The complete recipes in params/: each is a params.yaml, and describes the network that it says it does."""

from pathlib import Path

import pytest
import torch

from darkroom.diffusion.card import build_unet
from darkroom.diffusion.schedules import make_schedule
from darkroom.diffusion.timesteps import spaced_timesteps
from darkroom.params import load_params

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


def test_the_recipes_are_there():
    assert RECIPES == ["cifar10", "digits", "imagenet64", "photos"]


def test_the_projects_own_parameters_are_the_digits_recipe():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "params" / "digits.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "size", "schedule", "channels", "millions"),
    [
        ("cifar10", 32, "linear", [128, 256, 256, 256], 35.7),
        ("imagenet64", 64, "cosine", [64, 128, 256, 512], 63.4),
    ],
)
def test_large_recipes_are_those_of_the_papers(name, size, schedule, channels, millions):
    params = load_params(ROOT / "params" / f"{name}.yaml")
    train = params.train
    assert (params.data.image_size, train.schedule.name, train.model.channels) == (size, schedule, channels)
    assert (train.steps, train.batch_size, train.learning_rate, train.ema_decay) == (800_000, 128, 2e-4, 0.9999)
    assert (train.gradient_clip, train.label_dropout, train.weight_decay) == (1.0, 0.1, 0.0)
    with torch.device("meta"):
        network = build_unet(train.model, size, 3, params.data.num_classes, train.label_dropout)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert abs(count - millions) < 0.06  # the class embedding, of 1,001 rows for ImageNet, included


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_draw_from_timesteps_that_exist(name):
    params = load_params(ROOT / "params" / f"{name}.yaml")
    schedule = make_schedule(params.train.schedule.name, params.train.schedule.num_timesteps)
    assert len(spaced_timesteps(schedule, params.sample.steps, params.sample.spacing)) == params.sample.steps
