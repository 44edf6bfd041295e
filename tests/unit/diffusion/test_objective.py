import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from darkroom.diffusion.objective import (
    add_noise,
    diffusion_loss,
    drop_labels,
    loss_weight,
    to_eps,
    to_x_0,
    training_target,
)
from darkroom.diffusion.pixels import to_uint8, to_unit_range
from darkroom.diffusion.schedules import cosine, linear

SCHEDULES = {"linear": linear(1000), "cosine": cosine(1000)}
DIFFUSERS_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
DIFFUSERS_PREDICTION = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
EVERY_T = torch.arange(1000)

both_schedules = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", DIFFUSERS_PREDICTION)


def images_and_noise(n=1000, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype) * 2 - 1
    return x_0, torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype)


def noised(x_0, eps, alpha_bar):
    """The definition, in float64."""
    a = alpha_bar.reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def diffusers_scheduler(kind, name, **settings):
    """With our float64 table: test_schedules.py compares theirs, here only what is done with it matters."""
    scheduler = kind(num_train_timesteps=1000, beta_schedule=DIFFUSERS_SCHEDULE[name], **settings)
    scheduler.alphas_cumprod = SCHEDULES[name].alpha_bar
    return scheduler


def furthest(a, b):
    return float((a.double() - b.double()).abs().max())


# Noising


def test_noising_has_the_mean_and_variance_of_the_closed_form():
    schedule = linear(1000)
    x_0 = torch.full((20_000, 1, 1, 1), 0.5)
    eps = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for t in (0, 200, 999):
        a = float(schedule.alpha_bar[t])
        x_t = add_noise(x_0, eps, schedule.alpha_bar, torch.full((20_000,), t))
        assert abs(float(x_t.mean()) - 0.5 * a**0.5) < 0.02
        assert abs(float(x_t.var()) - (1 - a)) < 0.03


@both_schedules
def test_noising_agrees_with_diffusers_and_with_the_definition(name, oracle):
    x_0, eps = images_and_noise()
    ours = add_noise(x_0, eps.float(), SCHEDULES[name].alpha_bar, EVERY_T)
    theirs = diffusers_scheduler(DDPMScheduler, name).add_noise(x_0, eps, EVERY_T)
    oracle(f"x_t, {name}, every t", "diffusers add_noise", furthest(ours, theirs), 1e-6)
    exact = noised(x_0, eps, SCHEDULES[name].alpha_bar)
    oracle(f"x_t, {name}, every t", "the definition in float64", furthest(ours, exact), 1e-6)
    assert ours.dtype == torch.float32


@both_schedules
def test_every_timestep_gets_its_noise(name):
    schedule, ones = SCHEDULES[name], torch.ones(1000, 1, 1, 1)
    x_t = add_noise(ones, ones, schedule.alpha_bar, EVERY_T).flatten()
    a = schedule.alpha_bar
    assert torch.allclose(x_t.double(), a.sqrt() + (1 - a).sqrt(), atol=1e-6)
    assert bool((x_t - a.sqrt().float() > 0).all())


@pytest.mark.parametrize(("name", "lost"), [("linear", 10), ("cosine", 21)])
def test_a_table_in_bf16_would_lose_the_noise_of_the_first_timesteps(name, lost):
    table = SCHEDULES[name].alpha_bar.bfloat16()
    assert ((1 - table).sqrt() == 0).nonzero().flatten().tolist() == list(range(lost))


@pytest.mark.parametrize(("name", "lost"), [("linear", 10), ("cosine", 21)])
def test_bf16_images_get_their_noise_all_the_same(name, lost):
    x_0, eps = images_and_noise(lost, torch.bfloat16)
    x_t = add_noise(x_0, eps.float(), SCHEDULES[name].alpha_bar, torch.arange(lost))
    exact = noised(x_0.double(), eps.double(), SCHEDULES[name].alpha_bar[:lost])
    assert x_t.dtype == torch.float32
    assert furthest(x_t, exact) < 1e-6


# Predictions and the conversions between them


@both_schedules
@every_prediction
def test_the_target_stands_for_the_noise_and_the_image_it_was_made_of(name, prediction, oracle):
    x_0, eps = images_and_noise()
    alpha_bar = SCHEDULES[name].alpha_bar
    x_t = noised(x_0, eps, alpha_bar)
    target = training_target(prediction, x_0, eps, alpha_bar, EVERY_T)
    # Where an output is not the quantity itself, float64's rounding grows by the condition of the conversion.
    sigma = SCHEDULES[name].sigma.reshape(-1, 1, 1, 1)
    off_eps = (to_eps(prediction, target, x_t, alpha_bar) - eps) / (1 / sigma).clamp(min=1)
    off_x_0 = (to_x_0(prediction, target, x_t, alpha_bar) - x_0) / sigma.clamp(min=1)
    worst = max(float(off.abs().max()) for off in (off_eps, off_x_0))
    oracle(f"{prediction} to eps and x_0, {name}, every t", "eps and x_0 that made it, per condition", worst, 1e-14)


@both_schedules
def test_v_is_the_velocity_of_salimans_and_ho(name, oracle):
    # x_t = cos(phi) x_0 + sin(phi) eps, and v is its derivative by phi: taken here by central differences.
    x_0, eps = images_and_noise()
    phi = SCHEDULES[name].sigma.atan().reshape(-1, 1, 1, 1)
    h = 1e-5
    derivative = ((phi + h).cos() * x_0 + (phi + h).sin() * eps - (phi - h).cos() * x_0 - (phi - h).sin() * eps) / (
        2 * h
    )
    v = training_target("v", x_0, eps, SCHEDULES[name].alpha_bar, EVERY_T)
    oracle(f"v, {name}, every t", "d x_t / d angle, central differences", furthest(v, derivative), 1e-9)


@both_schedules
def test_v_is_the_velocity_of_diffusers(name, oracle):
    x_0, eps = images_and_noise()
    theirs = diffusers_scheduler(DDPMScheduler, name).get_velocity(x_0, eps, EVERY_T)
    ours = training_target("v", x_0, eps, SCHEDULES[name].alpha_bar, EVERY_T)
    oracle(f"v, {name}, every t", "diffusers get_velocity", furthest(ours, theirs), 1e-14)
    in_float32 = training_target("v", x_0.float(), eps.float(), SCHEDULES[name].alpha_bar, EVERY_T)
    assert in_float32.dtype == torch.float32
    assert furthest(in_float32, theirs) < 1e-6


@both_schedules
@every_prediction
def test_outputs_are_read_as_diffusers_reads_them(name, prediction, oracle):
    """Their DDIM returns its x_0, and its step to the timestep before shows its eps; the output is an arbitrary one."""
    reference = diffusers_scheduler(
        DDIMScheduler, name, prediction_type=DIFFUSERS_PREDICTION[prediction], clip_sample=False
    )
    reference.set_timesteps(1000)
    x_t, output = (tensor[:1] for tensor in images_and_noise())
    alpha_bar, worst = SCHEDULES[name].alpha_bar.tolist(), 0.0
    for t in range(999, 0, -1):
        theirs = reference.step(output, t, x_t)
        x_0, eps = (convert(prediction, output, x_t, alpha_bar[t]) for convert in (to_x_0, to_eps))
        stepped = math.sqrt(alpha_bar[t - 1]) * x_0 + math.sqrt(1 - alpha_bar[t - 1]) * eps
        size = float(x_0.abs().max() + eps.abs().max())
        worst = max(worst, furthest(x_0, theirs.pred_original_sample) / size)
        worst = max(worst, furthest(stepped, theirs.prev_sample) / size)
    oracle(f"{prediction} to x_0 and eps, {name}, every t", "diffusers DDIMScheduler.step, relative", worst, 1e-14)


@both_schedules
@every_prediction
def test_conversions_to_eps_and_to_x_0_belong_to_the_same_point(name, prediction, oracle):
    """For any output, also a wrong one: sqrt(a) x_0 + sqrt(1-a) eps = x_t, and converting back gives the output."""
    x_t, output = images_and_noise()
    alpha_bar = SCHEDULES[name].alpha_bar
    x_0, eps = (convert(prediction, output, x_t, alpha_bar) for convert in (to_x_0, to_eps))
    sigma = SCHEDULES[name].sigma.reshape(-1, 1, 1, 1)
    size = {"eps": 1 + sigma, "x_0": 1 + 1 / sigma, "v": torch.ones_like(sigma)}[prediction]
    closed = float(((noised(x_0, eps, alpha_bar) - x_t) / size).abs().max())
    back = float(((training_target(prediction, x_0, eps, alpha_bar, EVERY_T) - output) / size).abs().max())
    oracle(f"{prediction} to (x_0, eps) and back, {name}", "x_t and the output", max(closed, back), 1e-14)


@every_prediction
def test_one_float_for_all_rows_is_the_same_as_a_tensor_of_them(prediction):
    x_0, eps = images_and_noise(5, torch.float32)
    alpha_bar = SCHEDULES["cosine"].alpha_bar
    for convert in (to_eps, to_x_0):
        one = convert(prediction, eps, x_0, float(alpha_bar[700]))
        rows = convert(prediction, eps, x_0, alpha_bar[700].expand(5))
        assert one.dtype == rows.dtype == torch.float32
        assert torch.allclose(one, rows, rtol=1e-6)


@both_schedules
def test_an_error_of_the_output_grows_as_documented(name, oracle):
    """The pitfalls: eps is blind to x_0 where there is only noise, x_0 to eps where there is none; v is neither."""
    schedule, worst = SCHEDULES[name], 0.0
    _, error = images_and_noise()
    sigma, zero = schedule.sigma.reshape(-1, 1, 1, 1), torch.zeros_like(error)
    growth = {
        (to_x_0, "eps"): -sigma,
        (to_eps, "x_0"): -1 / sigma,
        (to_x_0, "v"): -(1 - schedule.alpha_bar).sqrt().reshape(-1, 1, 1, 1),
        (to_eps, "v"): schedule.alpha_bar.sqrt().reshape(-1, 1, 1, 1),
    }
    for (convert, prediction), factor in growth.items():
        change = convert(prediction, error, zero, schedule.alpha_bar)
        worst = max(worst, float(((change - factor * error) / factor).abs().max()))
    oracle(f"growth of an output's error, {name}", "sigma, 1/sigma, sqrt(1-a), sqrt(a)", worst, 1e-12)


def test_the_pitfalls_are_as_deep_as_documented():
    assert round(float(SCHEDULES["cosine"].sigma.max())) == 20_291  # eps to x_0
    assert round(1 / float(SCHEDULES["cosine"].sigma.min())) == 156  # x_0 to eps
    assert round(float(SCHEDULES["linear"].sigma.max())) == 157
    assert round(1 / float(SCHEDULES["linear"].sigma.min())) == 100


@both_schedules
@every_prediction
def test_nothing_is_infinite_at_any_timestep_in_float32(name, prediction):
    x_0, eps = images_and_noise(dtype=torch.float32)
    alpha_bar = SCHEDULES[name].alpha_bar
    x_t = add_noise(x_0, eps, alpha_bar, EVERY_T)
    target = training_target(prediction, x_0, eps, alpha_bar, EVERY_T)
    weight = loss_weight("min_snr", prediction, alpha_bar, EVERY_T)
    values = (target, to_eps(prediction, target, x_t, alpha_bar), to_x_0(prediction, target, x_t, alpha_bar), weight)
    assert all(bool(value.isfinite().all()) for value in values)
    assert all(value.dtype == torch.float32 for value in values)


# The loss and its weights


@every_prediction
def test_simple_weighting_is_the_plain_mean_squared_error(prediction):
    assert loss_weight("simple", prediction, SCHEDULES["cosine"].alpha_bar, EVERY_T) is None
    output, target = images_and_noise(dtype=torch.float32)
    loss = diffusion_loss(output, target, None)
    assert torch.equal(loss, torch.nn.functional.mse_loss(output, target))
    assert torch.allclose(loss, diffusion_loss(output, target, torch.ones(1000)))


def test_the_loss_is_float32_whatever_the_network_returns():
    output, target = images_and_noise(8, torch.float32)
    for weight in (None, torch.ones(8)):
        loss = diffusion_loss(output.bfloat16(), target, weight)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, diffusion_loss(output.bfloat16().float(), target, weight))


def test_the_weighted_loss_is_the_brute_force_mean(oracle):
    output, target = images_and_noise(7)
    weight, total = torch.rand(7, generator=torch.Generator().manual_seed(1)), 0.0
    for i in range(7):
        for a, b in zip(output[i].flatten().tolist(), target[i].flatten().tolist(), strict=True):
            total += float(weight[i]) * (a - b) ** 2
    ours = float(diffusion_loss(output.float(), target.float(), weight))
    oracle("weighted loss", "loop over all pixels, relative", abs(ours / (total / output.numel()) - 1), 1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_parts():
    output, target = images_and_noise(12, torch.float32)
    weight = torch.rand(12, generator=torch.Generator().manual_seed(1))
    parts = [diffusion_loss(output[i : i + 4], target[i : i + 4], weight[i : i + 4]) for i in (0, 4, 8)]
    assert torch.allclose(diffusion_loss(output, target, weight), torch.stack(parts).mean(), rtol=1e-6)


@both_schedules
@every_prediction
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_the_paper(name, prediction, gamma, oracle):
    weights, worst = loss_weight("min_snr", prediction, SCHEDULES[name].alpha_bar, EVERY_T, gamma), 0.0
    for weight, a in zip(weights.tolist(), SCHEDULES[name].alpha_bar.tolist(), strict=True):
        snr = a / (1 - a)
        clamped = snr if snr < gamma else gamma
        expected = {"eps": clamped / snr, "x_0": clamped, "v": clamped / (snr + 1)}[prediction]
        worst = max(worst, abs(weight / expected - 1))
    oracle(f"min-SNR weights, {prediction}, {name}", "Hang 2023, in a loop, relative", worst, 1e-7)


@both_schedules
def test_min_snr_weights_rest_on_the_signal_to_noise_ratio_of_diffusers(name, oracle):
    snr = compute_snr(diffusers_scheduler(DDPMScheduler, name), EVERY_T)  # in float32
    ours = loss_weight("min_snr", "eps", SCHEDULES[name].alpha_bar, EVERY_T)
    oracle(f"min-SNR weights, eps, {name}", "diffusers compute_snr", furthest(ours, snr.clamp(max=5) / snr), 1e-6)


@both_schedules
def test_with_min_snr_all_predictions_of_one_model_have_the_same_loss(name, oracle):
    """A model is wrong about x_0 by some amount; read as eps, x_0 or v, that must cost the same at every timestep."""
    schedule = SCHEDULES[name]
    x_0, eps = images_and_noise()
    x_t = noised(x_0, eps, schedule.alpha_bar)
    wrong_x_0 = x_0 + 0.1 * eps.flip(0)
    wrong_eps = to_eps("x_0", wrong_x_0, x_t, schedule.alpha_bar)
    outputs = {p: training_target(p, wrong_x_0, wrong_eps, schedule.alpha_bar, EVERY_T) for p in DIFFUSERS_PREDICTION}

    def losses(prediction):
        target = training_target(prediction, x_0, eps, schedule.alpha_bar, EVERY_T)
        weight = loss_weight("min_snr", prediction, schedule.alpha_bar, EVERY_T).double()
        return weight * (outputs[prediction] - target).square().flatten(1).mean(dim=1)

    worst = max(float((losses(p) / losses("x_0") - 1).abs().max()) for p in ("eps", "v"))
    oracle(f"min-SNR losses of eps and v, {name}, every t", "that of x_0, relative", worst, 1e-6)


@both_schedules
def test_without_weights_the_predictions_differ_by_snr_and_snr_plus_one(name, oracle):
    schedule = SCHEDULES[name]
    x_0, eps = images_and_noise()
    x_t, alpha_bar = noised(x_0, eps, schedule.alpha_bar), schedule.alpha_bar
    wrong_x_0 = x_0 + 0.1 * eps.flip(0)
    wrong_eps = to_eps("x_0", wrong_x_0, x_t, alpha_bar)
    error = {}
    for prediction in DIFFUSERS_PREDICTION:
        output = training_target(prediction, wrong_x_0, wrong_eps, alpha_bar, EVERY_T)
        target = training_target(prediction, x_0, eps, alpha_bar, EVERY_T)
        error[prediction] = (output - target).square().flatten(1).mean(dim=1)
    worst = max(
        float((error["eps"] / error["x_0"] / schedule.snr - 1).abs().max()),
        float((error["v"] / error["x_0"] / (schedule.snr + 1) - 1).abs().max()),
    )
    oracle(f"plain losses of eps and v over that of x_0, {name}", "SNR and SNR + 1, relative", worst, 1e-6)


@every_prediction
@pytest.mark.parametrize("t", [50, 400, 800])
def test_the_loss_of_the_optimal_linear_denoiser_is_the_closed_form(prediction, t, oracle):
    # x_0 ~ N(0, s): E[eps | x_t] = sqrt(1-a) x_t / (a s + 1 - a); of eps a s / (a s + 1 - a) stays unknown, of x_0
    # (1-a) s / (a s + 1 - a), of v s / (a s + 1 - a).
    schedule, s, n = cosine(1000), 0.3, 200_000
    generator = torch.Generator().manual_seed(t)
    a, steps = float(schedule.alpha_bar[t]), torch.full((n,), t)
    x_0 = s**0.5 * torch.randn(n, 1, 1, 1, generator=generator)
    eps = torch.randn(n, 1, 1, 1, generator=generator)
    x_t = add_noise(x_0, eps, schedule.alpha_bar, steps)
    best_eps = (1 - a) ** 0.5 * x_t / (a * s + 1 - a)
    output = training_target(prediction, to_x_0("eps", best_eps, x_t, a), best_eps, schedule.alpha_bar, steps)
    target = training_target(prediction, x_0, eps, schedule.alpha_bar, steps)
    for weighting in ("simple", "min_snr"):
        weight = loss_weight(weighting, prediction, schedule.alpha_bar, steps)
        unknown = {"eps": a * s, "x_0": (1 - a) * s, "v": s}[prediction] / (a * s + 1 - a)
        expected = unknown * (1.0 if weight is None else float(weight[0]))
        measured = abs(float(diffusion_loss(output, target, weight)) / expected - 1)
        oracle(f"E[{weighting} loss], {prediction}", "optimal linear denoiser, relative", measured, 4 * (2 / n) ** 0.5)


# Labels and images


def test_labels_are_dropped_to_the_null_class_exactly_where_the_coin_says_so():
    labels, coin = torch.tensor([0, 1, 2, 3]), torch.tensor([0.05, 0.1, 0.0999, 0.9])
    assert drop_labels(labels, coin, 0.1, null_class=10).tolist() == [10, 1, 10, 3]


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)


def test_values_out_of_range_are_clamped():
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]
