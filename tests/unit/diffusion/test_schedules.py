import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.diffusion.schedules import Posterior, Schedule, cosine, linear, make_schedule

SCHEDULES = {"linear": linear(1000), "cosine": cosine(1000)}
PAIRS = [(1, 0), (2, 1), (500, 499), (999, 998), (999, 0), (999, 949), (500, 20), (20, 3), (995, 945)]


def diffusers_scheduler(name, **settings):
    kind = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[name]
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule=kind, **settings)


def furthest(ours, reference):
    """The largest relative difference."""
    return float(((ours - reference) / reference).abs().max())


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_agree_with_diffusers(name, oracle):
    schedule, reference = SCHEDULES[name], diffusers_scheduler(name)
    oracle(f"betas, {name}", "diffusers (fp32), relative", furthest(schedule.betas, reference.betas), 2e-7)
    difference = float((schedule.alpha_bar - reference.alphas_cumprod).abs().max())
    oracle(f"alpha_bar, {name}", "diffusers (fp32)", difference, 5e-7)


def test_linear_tables_are_the_exact_fractions(oracle):
    schedule, alpha_bar = linear(100), Fraction(1)
    differences = []
    for t in range(100):
        beta = Fraction(1, 1000) + Fraction(199, 1000) * Fraction(t, 99)  # ten times 1e-4 … 0.02
        alpha_bar *= 1 - beta
        pairs = (
            (schedule.betas, beta),
            (schedule.alphas, 1 - beta),
            (schedule.alpha_bar, alpha_bar),
            (schedule.snr, alpha_bar / (1 - alpha_bar)),
        )
        differences += [abs(float(Fraction(float(table[t])) / exact - 1)) for table, exact in pairs]
    oracle("betas, alphas, alpha_bar, SNR; linear, T = 100", "exact fractions, relative", max(differences), 1e-12)


def test_alpha_bar_is_the_brute_force_product(oracle):
    for name, schedule in SCHEDULES.items():
        product, worst = 1.0, 0.0
        for t, beta in enumerate(schedule.betas.tolist()):
            product *= 1 - beta
            worst = max(worst, abs(float(schedule.alpha_bar[t]) / product - 1))
        oracle(f"alpha_bar, {name}", "product in a loop, relative", worst, 1e-12)


def test_the_linear_schedule_is_the_published_one():
    betas = linear(1000).betas
    assert (float(betas[0]), float(betas[-1])) == (1e-4, 0.02)
    assert torch.allclose(betas.diff(), torch.tensor(0.0199 / 999, dtype=torch.float64), rtol=1e-9)


def test_cosine_follows_its_formula_until_the_cap(oracle):
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine(1000)
    uncapped = range(999)
    worst = max(abs(float(schedule.alpha_bar[t]) / (f(t + 1) / f(0)) - 1) for t in uncapped)
    oracle("alpha_bar, cosine, before the cap", "cos^2 of the paper, relative", worst, 1e-9)
    assert (schedule.betas == 0.999).nonzero().flatten().tolist() == [999]


def test_the_end_of_the_cosine_schedule_is_as_steep_as_published():
    schedule = cosine(1000)
    assert round(float(schedule.alpha_bar[-1]) ** -0.5) == 20_291
    assert round(float(schedule.sigma[-1])) == 20_291


@pytest.mark.parametrize("name", SCHEDULES)
def test_snr_lambda_and_sigma_say_the_same(name, oracle):
    schedule, worst = SCHEDULES[name], 0.0
    for t, a in enumerate(schedule.alpha_bar.tolist()):
        noise = 1 - a
        snr, log_snr, sigma = (float(table[t]) for table in (schedule.snr, schedule.log_snr, schedule.sigma))
        worst = max(
            worst,
            abs(snr / (a / noise) - 1),
            abs(log_snr - (math.log(a) - math.log(noise)) / 2),
            abs(sigma / math.sqrt(noise / a) - 1),
            abs(math.exp(2 * log_snr) / snr - 1),
            abs(sigma * math.exp(log_snr) - 1),
            abs(1 / (1 + sigma**2) / a - 1),
        )
    oracle(f"SNR, lambda, sigma; {name}", "each other's closed forms", worst, 1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_noise_at_every_step(name):
    schedule = SCHEDULES[name]
    for table, sign in (("alpha_bar", -1), ("snr", -1), ("log_snr", -1), ("sigma", 1)):
        assert bool((getattr(schedule, table).diff() * sign > 0).all()), table


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_table_is_finite_float64_and_computed_once(name):
    schedule = make_schedule(name, 1000)
    for table in ("betas", "alphas", "alpha_bar", "snr", "log_snr", "sigma"):
        values = getattr(schedule, table)
        assert values.dtype == torch.float64
        assert values.shape == (1000,)
        assert bool(values.isfinite().all())
        assert getattr(schedule, table) is values


def bayes(schedule, t, s):
    """q(x_s | x_t, x_0) as a product of Gaussians, from the betas alone.

    x_s given x_0 is N(m x_0, p), by adding noise step by step; x_t given x_s is N(k x_s, q) likewise. Precisions add.
    """
    m, p = 1.0, 0.0
    for beta in schedule.betas[: s + 1].tolist():
        m, p = math.sqrt(1 - beta) * m, (1 - beta) * p + beta
    k, q = 1.0, 0.0
    for beta in schedule.betas[s + 1 : t + 1].tolist():
        k, q = math.sqrt(1 - beta) * k, (1 - beta) * q + beta
    precision = 1 / p + k * k / q
    return Posterior(x_0=m / p / precision, x_t=k / q / precision, variance=1 / precision, beta=q)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_is_bayes_rule_for_adjacent_and_for_skipped_steps(name, oracle):
    schedule, worst = SCHEDULES[name], 0.0
    for t, s in PAIRS:
        ours, reference = schedule.posterior(t, s), bayes(schedule, t, s)
        for field in ("x_0", "x_t", "variance", "beta"):
            worst = max(worst, abs(getattr(ours, field) / getattr(reference, field) - 1))
    oracle(f"posterior of any two timesteps, {name}", "product of Gaussians, relative", worst, 1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_of_adjacent_steps_is_that_of_ddpm(name, oracle):
    schedule, worst = SCHEDULES[name], 0.0
    alpha_bar = schedule.alpha_bar.tolist()
    for t in range(1, 1000):
        beta, a_t, a_s = float(schedule.betas[t]), alpha_bar[t], alpha_bar[t - 1]
        ours = schedule.posterior(t, t - 1)
        worst = max(
            worst,
            abs(ours.x_0 / (math.sqrt(a_s) * beta / (1 - a_t)) - 1),
            abs(ours.x_t / (math.sqrt(1 - beta) * (1 - a_s) / (1 - a_t)) - 1),
            abs(ours.variance / ((1 - a_s) / (1 - a_t) * beta) - 1),
            abs(ours.beta / beta - 1),
        )
    oracle(f"posterior of adjacent timesteps, {name}", "Ho 2020, eqs. 6-7, relative", worst, 1e-10)


@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_tilde_agrees_with_diffusers(name, steps, oracle):
    reference = diffusers_scheduler(name, timestep_spacing="leading", variance_type="fixed_small")
    reference.set_timesteps(steps)
    schedule, pairs = SCHEDULES[name], itertools.pairwise(reference.timesteps.tolist())
    worst = max(abs(schedule.posterior(t, s).variance - float(reference._get_variance(t))) for t, s in pairs)
    oracle(f"beta-tilde, {steps} steps, {name}", "diffusers DDPMScheduler (fp32)", worst, 5e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_turns_the_marginal_at_t_into_the_marginal_at_s(name, oracle):
    # x_0 is kept; x_t = sqrt(a_t) x_0 + noise. Mean and variance of x_s must be those of noising x_0 to s directly.
    schedule, worst = SCHEDULES[name], 0.0
    for t, s in PAIRS:
        a_t, a_s, posterior = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s]), schedule.posterior(t, s)
        mean = posterior.x_0 + posterior.x_t * math.sqrt(a_t)
        variance = posterior.variance + posterior.x_t**2 * (1 - a_t)
        worst = max(worst, abs(mean - math.sqrt(a_s)), abs(variance - (1 - a_s)))
    oracle(f"posterior after noising to t, {name}", "noising to s", worst, 1e-12)


@pytest.mark.parametrize("last", [None, -1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_step_is_the_estimate_of_x_0_itself(name, last):
    for t in (0, 1, 500, 999):
        beta = 1 - float(SCHEDULES[name].alpha_bar[t])
        assert SCHEDULES[name].posterior(t, last) == Posterior(x_0=1.0, x_t=0.0, variance=0.0, beta=beta)


@pytest.mark.parametrize(("t", "s"), [(5, 5), (5, 6), (5, -2), (1000, 3), (-1, None), (-1, -2)])
def test_a_posterior_of_timesteps_that_do_not_exist_is_refused(t, s):
    with pytest.raises(ValueError, match=rf"posterior from t = {t} to s = .*expected -1 <= s < t < 1000"):
        linear(1000).posterior(t, s)


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_a_schedule_of_any_length_is_sound_or_refused(name, num_timesteps):
    if name == "linear" and 2 <= num_timesteps <= 20:
        with pytest.raises(ValueError, match="expected every beta in"):
            make_schedule(name, num_timesteps)
        return
    schedule = make_schedule(name, num_timesteps)
    assert schedule.num_timesteps == num_timesteps
    assert bool((schedule.sigma.diff() > 0).all())
    assert bool(schedule.sigma.isfinite().all())
    assert bool(schedule.log_snr.isfinite().all())


def test_a_linear_schedule_too_short_to_exist_is_refused():
    with pytest.raises(ValueError, match=re.escape("expected every beta in (0, 1), got 1 at t = 19 of 20")):
        linear(20)
    assert float(linear(21).betas[-1]) < 1


@pytest.mark.parametrize("num_timesteps", [0, -3])
@pytest.mark.parametrize("make", [linear, cosine])
def test_a_schedule_without_timesteps_is_refused(make, num_timesteps):
    with pytest.raises(ValueError, match=f"num_timesteps = {num_timesteps}: expected at least 1"):
        make(num_timesteps)


@pytest.mark.parametrize("betas", [[0.1, float("nan")], [0.0, 0.1], [0.5, 1.0], [-0.1]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="expected every beta in"):
        Schedule(torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize(
    ("betas", "where"),
    [
        ([1e-17, 0.1], "got 1 at t = 0"),  # lost in 1 - beta: no noise at all
        ([0.1, 1e-17], "got 0.9 at t = 1"),  # a step of no width, which a solver would divide by
        ([0.999] * 200, "got 0 at t ="),  # the product underflows: log_snr would be -inf
    ],
)
def test_betas_that_float64_cannot_tell_from_impossible_ones_are_refused(betas, where):
    with pytest.raises(ValueError, match=f"expected alpha_bar to fall from 1 and stay above 0, {where}"):
        Schedule(torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize(
    "betas",
    [torch.full((10,), 0.1), torch.full((2, 5), 0.1, dtype=torch.float64), torch.empty(0, dtype=torch.float64)],
)
def test_tables_of_another_type_or_shape_are_refused(betas):
    with pytest.raises(ValueError, match="expected float64 betas of shape"):
        Schedule(betas)
