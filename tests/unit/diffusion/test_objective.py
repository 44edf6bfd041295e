import pytest
import torch

from darkroom.diffusion.guidance import guided
from darkroom.diffusion.model import to_uint8, to_unit_range
from darkroom.diffusion.objective import add_noise, drop_labels, simple_loss
from darkroom.diffusion.schedules import cosine, linear


def test_noising_has_the_mean_and_variance_of_the_closed_form():
    schedule = linear(1000)
    x_0, eps = (
        torch.full((20_000, 1, 1, 1), 0.5),
        torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)),
    )
    for t in (0, 200, 999):
        a = float(schedule.alpha_bar[t])
        x_t = add_noise(x_0, eps, schedule.alpha_bar, torch.full((20_000,), t))
        assert abs(float(x_t.mean()) - 0.5 * a**0.5) < 0.02
        assert abs(float(x_t.var()) - (1 - a)) < 0.03


@pytest.mark.parametrize("make", [linear, cosine])
def test_every_timestep_gets_noise(make):
    schedule = make(1000)
    t = torch.arange(1000)
    x_0, eps = torch.ones(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    a = schedule.alpha_bar
    noised = add_noise(x_0, eps, a, t).flatten()
    assert torch.allclose(noised.double(), a.sqrt() + (1 - a).sqrt(), atol=1e-6)
    assert bool((noised - a.sqrt().float() > 0).all())


def test_the_loss_of_the_optimal_linear_denoiser_is_the_closed_form():
    # x_0 ~ N(0, v): E[eps | x_t] = sqrt(1-a) x_t / (a v + 1 - a), and the loss is a v / (a v + 1 - a).
    schedule, v, n = cosine(1000), 0.3, 200_000
    generator = torch.Generator().manual_seed(0)
    for t in (50, 400, 800):
        a = float(schedule.alpha_bar[t])
        x_0 = v**0.5 * torch.randn(n, 1, 1, 1, generator=generator)
        eps = torch.randn(n, 1, 1, 1, generator=generator)
        steps = torch.full((n,), t)
        x_t = add_noise(x_0, eps, schedule.alpha_bar, steps)
        loss = simple_loss(lambda x, t, y, a=a: (1 - a) ** 0.5 * x / (a * v + 1 - a), x_t, steps, steps, eps)
        assert abs(float(loss) - a * v / (a * v + 1 - a)) < 0.01


def test_labels_are_dropped_to_the_null_class_exactly_where_the_coin_says_so():
    labels, coin = torch.tensor([0, 1, 2, 3]), torch.tensor([0.05, 0.1, 0.0999, 0.9])
    assert drop_labels(labels, coin, 0.1, null_class=10).tolist() == [10, 1, 10, 3]


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)


def test_values_out_of_range_are_clamped():
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]


def fake_network(x, t, labels):
    return x * (labels.reshape(-1, 1, 1, 1) + 1.0) + t.reshape(-1, 1, 1, 1)


X, T, LABELS = torch.randn(4, 1, 2, 2), torch.tensor([3, 3, 3, 3]), torch.tensor([0, 1, 2, 1])


def test_guidance_one_is_conditional_and_zero_is_unconditional():
    assert torch.equal(guided(fake_network, LABELS, 1.0, 10)(X, T), fake_network(X, T, LABELS))
    assert torch.equal(guided(fake_network, LABELS, 0.0, 10)(X, T), fake_network(X, T, torch.full((4,), 10)))


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_mixes_all_channels_by_the_one_convention(s):
    conditional, unconditional = fake_network(X, T, LABELS), fake_network(X, T, torch.full((4,), 10))
    expected = unconditional + s * (conditional - unconditional)
    assert torch.allclose(guided(fake_network, LABELS, s, 10)(X, T), expected, atol=1e-5)
    w = s - 1  # the paper's
    assert torch.allclose(expected, (1 + w) * conditional - w * unconditional, atol=1e-4)


def test_guidance_without_a_null_class_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale = 2.0: this model has no null class"):
        guided(fake_network, LABELS, 2.0, None)
