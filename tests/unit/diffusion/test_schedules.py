import math

import pytest
import torch
from diffusers import DDPMScheduler

from darkroom.diffusion.schedules import Schedule, cosine, linear


@pytest.mark.parametrize(("make", "name"), [(linear, "linear"), (cosine, "squaredcos_cap_v2")])
def test_tables_agree_with_diffusers(make, name):
    reference = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    assert torch.allclose(make(1000).betas.float(), reference.betas, rtol=1e-5, atol=1e-9)
    assert torch.allclose(make(1000).alpha_bar.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_alpha_bar_is_the_product_of_alphas():
    schedule, product = linear(1000), 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert math.isclose(float(schedule.alpha_bar[t]), product, rel_tol=1e-12)


def test_cosine_follows_its_formula_until_the_cap():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine(1000)
    for t in (0, 1, 250, 500, 900, 990):
        assert math.isclose(float(schedule.alpha_bar[t]), f(t + 1) / f(0), rel_tol=1e-9)
    assert float(schedule.betas.max()) == 0.999


def test_the_end_of_the_cosine_schedule_is_as_steep_as_published():
    assert round(float(cosine(1000).alpha_bar[-1]) ** -0.5) == 20_291


def test_log_snr_decreases():
    for schedule in (linear(1000), cosine(1000)):
        assert bool((schedule.log_snr.diff() < 0).all())


def test_a_linear_schedule_too_short_to_exist_is_refused():
    with pytest.raises(ValueError, match="expected every beta in"):
        linear(20)


@pytest.mark.parametrize("betas", [[0.1, float("nan")], [0.0, 0.1], [0.5, 1.0], [-0.1]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="expected every beta in"):
        Schedule(torch.tensor(betas, dtype=torch.float64))


def test_float32_tables_are_refused():
    with pytest.raises(ValueError, match="float64"):
        Schedule(torch.full((10,), 0.1))
