"""Guidance beside its formula, computed from separate calls, and beside a closed form of what it samples."""

import math

import pytest
import torch

from darkroom.diffusion.guidance import Network, guided
from darkroom.diffusion.samplers import SAMPLERS, Sampling
from darkroom.diffusion.schedules import linear
from darkroom.diffusion.timesteps import spaced_timesteps
from tests.unit.diffusion.mixture import Mixture

NULL = 10
LABELS = torch.tensor([3, 1, 4, 1, 5, 9])
SIGMA = linear(1000).sigma


def network(x_t: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
    """Something nonlinear in x_t, t and the label, where each row depends on itself alone."""
    return torch.sin(3 * x_t + labels.reshape(-1, 1, 1, 1)) * (1 + t / 1000)


def noise(num: int = len(LABELS), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((num, 3, 4, 4), dtype=dtype, generator=torch.Generator().manual_seed(0))


def recorded(calls: list[torch.Tensor]) -> Network:
    """The network, keeping the labels of each call."""

    def call(x_t: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        assert x_t.shape[0] == len(labels)
        calls.append(labels)
        return network(x_t, t, labels)

    return call


def halves(x_t: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditional and the unconditional output, by two calls."""
    return network(x_t, t, LABELS), network(x_t, t, torch.full_like(LABELS, NULL))


@pytest.mark.parametrize("scale", [0.3, 1.5, 2.0, 7.5])
def test_guidance_equals_its_formula(oracle, scale):
    x_t = noise(dtype=torch.float64)
    eps_c, eps_u = halves(x_t, 400)
    difference = guided(network, LABELS, scale, NULL)(x_t, 400) - (eps_u + scale * (eps_c - eps_u))
    w = scale - 1  # the convention of the paper
    paper = guided(network, LABELS, scale, NULL)(x_t, 400) - ((1 + w) * eps_c - w * eps_u)
    oracle("guidance, s", "eps_u + s (eps_c - eps_u), two calls", difference.abs().max(), 1e-14)
    oracle("guidance, s", "(1 + w) eps_c - w eps_u, w = s - 1", paper.abs().max(), 1e-13)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_samples_the_density_that_it_defines(oracle, name, scale):
    # With p(x | c) = N(m, v) and p(x) = N(0, v), guidance samples p(x | c)^s p(x)^(1-s) = N(s m, v), at every t.
    classes = Mixture((1.0,), (0.2,), (0.1,)), Mixture((1.0,), (0.0,), (0.1,))
    schedule, x = linear(1000), torch.linspace(-2, 2, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)

    def exact(x_t: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        of_class, of_all = (mixture.eps(x_t, float(schedule.alpha_bar[t])) for mixture in classes)
        return torch.where((labels == NULL).reshape(-1, 1, 1, 1), of_all, of_class)

    denoise = guided(exact, torch.ones(7, dtype=torch.int64), scale, NULL)
    ours = SAMPLERS[name](denoise, x, schedule, spaced_timesteps(schedule, 1000))
    expected = Mixture((1.0,), (scale * 0.2,), (0.1,)).flow(x, float(schedule.alpha_bar[-1]), 1.0)
    oracle(f"guidance, {name}, 1000 steps", "flow of p(x|c)^s p(x)^(1-s)", (ours - expected).abs().max(), 5e-3)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("scale", "half"), [(1.0, 0), (0.0, 1)])
def test_s_1_is_conditional_and_s_0_unconditional_to_the_last_bit_and_at_half_the_cost(scale, half, per_sample):
    calls: list[torch.Tensor] = []
    scales = torch.full((len(LABELS),), scale) if per_sample else scale
    x_t = noise()
    assert torch.equal(guided(recorded(calls), LABELS, scales, NULL)(x_t, 7), halves(x_t, 7)[half])
    assert [len(labels) for labels in calls] == [len(LABELS)]


def test_scales_of_one_batch_give_each_sample_what_it_gets_alone():
    calls: list[torch.Tensor] = []
    x_t, scales = noise(), torch.tensor([0.0, 1.0, 2.5, 1.0, 0.5, 0.0])
    together = guided(recorded(calls), LABELS, scales, NULL)(x_t, 250)
    for i, scale in enumerate(scales.tolist()):
        row = slice(i, i + 1)
        assert torch.equal(together[row], guided(network, LABELS[row], scale, NULL)(x_t[row], 250))
    eps_c, eps_u = halves(x_t, 250)
    assert torch.equal(together[[1, 3]], eps_c[[1, 3]])
    assert torch.equal(together[[0, 5]], eps_u[[0, 5]])
    assert [labels.tolist() for labels in calls] == [[1, 4, 1, 5, NULL, NULL, NULL, NULL]]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, torch.tensor([0.0, 1.0, 2.5, 1.0, 0.5, 0.0])])
def test_an_interval_of_all_noise_levels_is_none_to_the_last_bit(scale):
    x_t = noise()
    always = guided(network, LABELS, scale, NULL)
    everywhere = guided(network, LABELS, scale, NULL, sigma=SIGMA, interval=(0, math.inf))
    for t in (0, 1, 500, 999):
        assert torch.equal(everywhere(x_t, t), always(x_t, t))


def test_outside_the_interval_only_the_conditional_half_is_asked():
    calls: list[torch.Tensor] = []
    x_t, interval = noise(), (float(SIGMA[100]), float(SIGMA[600]))
    denoise = guided(recorded(calls), LABELS, 3.0, NULL, sigma=SIGMA, interval=interval)
    always = guided(network, LABELS, 3.0, NULL)
    for t, inside in ((999, False), (601, False), (600, True), (300, True), (101, True), (100, False), (0, False)):
        calls.clear()
        assert torch.equal(denoise(x_t, t), always(x_t, t) if inside else halves(x_t, t)[0])
        assert [len(labels) for labels in calls] == [2 * len(LABELS) if inside else len(LABELS)]


def test_a_sampler_calls_the_network_once_per_step():
    calls: list[torch.Tensor] = []
    schedule, interval = linear(1000), (float(SIGMA[200]), float(SIGMA[700]))
    denoise = guided(recorded(calls), LABELS, 2.0, NULL, sigma=SIGMA, interval=interval)
    timesteps = spaced_timesteps(schedule, 10)
    SAMPLERS["ddim"](denoise, noise(), schedule, timesteps)
    assert [len(labels) for labels in calls] == [12 if 200 < t <= 700 else 6 for t in timesteps]


def test_no_value_is_read_from_the_device():
    labels, x = LABELS.to("meta"), noise().to("meta")
    scales = torch.tensor([0.0, 1.0, 2.5, 1.0, 0.5, 0.0])
    denoise = guided(network, labels, scales, NULL, sigma=SIGMA, interval=(0.1, 10))
    x_0 = SAMPLERS["dpmpp_2m"](denoise, x, linear(1000), spaced_timesteps(linear(1000), 10), Sampling())
    assert x_0.shape == x.shape


def test_a_model_without_null_class_runs_unguided():
    x_t = noise()
    ones = torch.ones(len(LABELS))
    for scale, interval in ((1, None), (ones, None), (1.0, (0.1, 10.0))):
        denoise = guided(network, LABELS, scale, None, sigma=SIGMA, interval=interval)
        assert torch.equal(denoise(x_t, 500), halves(x_t, 500)[0])


@pytest.mark.parametrize(
    ("scale", "null_class", "message"),
    [
        (2.0, None, "guidance_scale = 2.0: this model has no null class, only 1 is possible"),
        (0.0, None, "guidance_scale = 0.0: this model has no null class, only 1 is possible"),
        (torch.tensor([1, 1, 1, 1, 1, 1.5]), None, "guidance_scale = 1.5: this model has no null class"),
        (-1.0, NULL, "guidance_scale = -1.0: expected 0 or more"),
        (math.nan, NULL, "guidance_scale = nan: expected 0 or more"),
        (math.inf, NULL, "guidance_scale = inf: expected 0 or more"),
        (torch.tensor([1, 1, -2.0, 1, 1, 1]), NULL, "guidance_scale = -2.0: expected 0 or more"),
        (torch.ones(5), NULL, r"guidance_scale of shape \(5,\): expected one number or \(6,\)"),
        (torch.ones(6, 1), NULL, r"guidance_scale of shape \(6, 1\): expected one number or \(6,\)"),
    ],
)
def test_impossible_scales_are_refused(scale, null_class, message):
    with pytest.raises(ValueError, match=message):
        guided(network, LABELS, scale, null_class)


@pytest.mark.parametrize("interval", [(2, 1), (1, 1), (-1, 1), (math.nan, 1), (0, math.nan)])
def test_impossible_intervals_are_refused(interval):
    with pytest.raises(ValueError, match=f"guidance interval {interval[0]} to {interval[1]}: expected 0 <= lo < hi"):
        guided(network, LABELS, 2.0, NULL, sigma=SIGMA, interval=interval)


def test_an_interval_without_the_noise_levels_is_refused():
    with pytest.raises(ValueError, match="expected the schedule's sigma with it, got None"):
        guided(network, LABELS, 2.0, NULL, interval=(0.1, 1))
