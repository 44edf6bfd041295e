"""Every sampler beside an independent implementation and beside closed forms, on a mixture whose eps is exact.

Differences from diffusers are root mean squares in float64; what remains is the rounding of its float32 tables, which
single pixels between the two modes of the mixture amplify. Both draw the same noise, from generators of one seed.
"""

import math

import diffusers
import pytest
import torch

from darkroom.diffusion.guidance import Denoiser
from darkroom.diffusion.samplers import (
    SAMPLERS,
    THRESHOLDS,
    Sampling,
    StepNoise,
    ddim,
    ddpm,
    ddpm_beta,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dynamic_threshold,
    heun,
    network_evaluations,
    static_threshold,
)
from darkroom.diffusion.schedules import Schedule, cosine, linear
from darkroom.diffusion.timesteps import spaced_timesteps
from tests.loops import each
from tests.unit.diffusion.mixture import Mixture

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers

MIXTURE = Mixture()
DETERMINISTIC = ["ddim", "dpmpp_2m", "dpmpp_2s", "heun"]
STOCHASTIC = ["ddpm", "ddpm_beta", "dpmpp_2m_sde"]


def noise(seed: int, pixels: int = 1024) -> torch.Tensor:
    return torch.randn((pixels // 16, 1, 4, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(seed: int) -> StepNoise:
    generator = torch.Generator().manual_seed(seed)
    return lambda _, x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


def imperfect(denoise: Denoiser, relative_error: float) -> Denoiser:
    return lambda x, t: denoise(x, t) * (1 + relative_error)


def watched(denoise: Denoiser, seen: list[tuple[int, torch.Tensor]]) -> Denoiser:
    """Keep what a sampler asks for."""

    def remember(x: torch.Tensor, t: int) -> torch.Tensor:
        seen.append((t, x))
        return denoise(x, t)

    return remember


# diffusers


def theirs(name: str, schedule: Schedule, **settings):
    """A diffusers scheduler over our betas."""
    return getattr(diffusers, name)(
        num_train_timesteps=schedule.num_timesteps, trained_betas=schedule.betas.numpy(), **settings
    )


def run_theirs(scheduler, denoise: Denoiser, x: torch.Tensor, **step_arguments) -> torch.Tensor:
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(denoise(x, t), t, x, **step_arguments).prev_sample
    return x


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@each("make", [linear, cosine])
@each(("steps", "tolerance"), [(10, 2e-5), (13, 2e-5), (50, 2e-5), (1000, 3e-4)])
@each(("sampler", "variance_type"), [(ddpm, "fixed_small"), (ddpm_beta, "fixed_large")])
def test_ddpm_agrees_with_diffusers(oracle, make, steps, tolerance, sampler, variance_type):
    # diffusers raises beta-tilde to 1e-20 at least, which is a standard deviation of 1e-10 where ours is 0; and it
    # omits the noise at t = 0, ours at the last timestep whichever that is: these lists end at 0.
    schedule, x = make(1000), noise(0)
    denoise = MIXTURE.denoiser(schedule)
    scheduler = theirs("DDPMScheduler", schedule, clip_sample=False, variance_type=variance_type)
    scheduler.set_timesteps(steps)
    reference = run_theirs(scheduler, denoise, x, generator=seeded())
    ours = sampler(denoise, x, schedule, scheduler.timesteps.tolist(), Sampling(step_noise=drawn(1)))
    title = f"{sampler.__name__}, {make.__name__}, {'1000 steps' if steps == 1000 else 'up to 50 steps'}"
    oracle(title, f"diffusers DDPMScheduler {variance_type}", rms(ours - reference), tolerance)


def test_ddpm_takes_any_list_of_timesteps_as_diffusers_does(oracle):
    schedule, x = cosine(1000), noise(0)
    denoise, timesteps = MIXTURE.denoiser(schedule), spaced_timesteps(schedule, 37)
    scheduler = theirs("DDPMScheduler", schedule, clip_sample=True, variance_type="fixed_small")
    scheduler.set_timesteps(timesteps=timesteps)
    reference = run_theirs(scheduler, denoise, x, generator=seeded())
    options = Sampling(step_noise=drawn(1), threshold=static_threshold)
    difference = rms(ddpm(denoise, x, schedule, timesteps, options) - reference)
    oracle("ddpm, clipped, trailing from λ = -5.1", "diffusers DDPMScheduler fixed_small", difference, 2e-5)


@each("make", [linear, cosine])
@each(
    ("spacing", "steps"),
    [("leading", 7), ("leading", 10), ("leading", 50), ("leading", 300), ("trailing", 10), ("trailing", 50)],
)
@each("eta", [0.0, 0.5, 1.0])
def test_ddim_agrees_with_diffusers(oracle, make, spacing, steps, eta):
    schedule, x = make(1000), noise(2)
    denoise, timesteps = MIXTURE.denoiser(schedule), spaced_timesteps(schedule, steps, spacing, clip_start=False)
    scheduler = theirs("DDIMScheduler", schedule, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps
    reference = run_theirs(scheduler, denoise, x, eta=eta, generator=seeded())
    ours = ddim(denoise, x, schedule, timesteps, Sampling(step_noise=drawn(1), eta=eta))
    tolerance = 4e-6 if eta == 0 else 2e-5  # with noise as close as DDPM, which eta = 1 is
    difference = rms(ours - reference)
    oracle(f"ddim, eta = {eta}, {make.__name__}, {spacing}", "diffusers DDIMScheduler", difference, tolerance)


@each(
    ("threshold", "settings"),
    [("static", {"clip_sample": True}), ("dynamic", {"thresholding": True, "sample_max_value": 1e9})],
)
def test_ddim_with_a_threshold_derives_the_noise_anew_as_diffusers_does(oracle, threshold, settings):
    schedule, x = linear(1000), noise(3)
    denoise = imperfect(MIXTURE.denoiser(schedule), 0.1)  # so that there is something to clip
    scheduler = theirs("DDIMScheduler", schedule, **({"clip_sample": False} | settings), set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    reference = run_theirs(scheduler, denoise, x, use_clipped_model_output=True)
    timesteps = scheduler.timesteps.tolist()
    ours = ddim(denoise, x, schedule, timesteps, Sampling(threshold=THRESHOLDS[threshold]))
    assert rms(ours - ddim(denoise, x, schedule, timesteps)) > 0.01
    oracle(f"ddim, {threshold} threshold", "diffusers DDIMScheduler", rms(ours - reference), 1e-6)


@each("steps", [10, 11, 25, 50])
@each(
    ("sampler", "name", "settings", "make", "tolerance"),
    [
        (dpmpp_2m, "DPMSolverMultistepScheduler", {}, linear, 1e-5),
        (dpmpp_2m, "DPMSolverMultistepScheduler", {}, cosine, 4e-4),  # from t = 999, where 1/sqrt(alpha_bar) is 20,291
        (dpmpp_2m_sde, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, linear, 1e-5),
        (dpmpp_2m_sde, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, cosine, 4e-4),
        (dpmpp_2s, "DPMSolverSinglestepScheduler", {"lower_order_final": True}, linear, 1e-6),
        (dpmpp_2s, "DPMSolverSinglestepScheduler", {"lower_order_final": True}, cosine, 4e-4),
    ],
)
def test_dpm_solvers_agree_with_diffusers(oracle, sampler, name, settings, make, tolerance, steps):
    schedule, x = make(1000), noise(4)
    denoise = MIXTURE.denoiser(schedule)
    scheduler = theirs(name, schedule, solver_order=2, solver_type="midpoint", final_sigmas_type="zero", **settings)
    scheduler.set_timesteps(steps)
    timesteps, draw, reference = scheduler.timesteps.tolist(), drawn(1), x
    for t in timesteps:
        arguments = {"variance_noise": draw(0, x)} if sampler is dpmpp_2m_sde else {}
        reference = scheduler.step(denoise(reference, t), t, reference, **arguments).prev_sample
    ours = sampler(denoise, x, schedule, timesteps, Sampling(step_noise=drawn(1)))
    kind = " sde" if sampler is dpmpp_2m_sde else ""
    oracle(f"{sampler.__name__}, {make.__name__}, t = 999", f"diffusers {name}{kind}", rms(ours - reference), tolerance)


@each("steps", [10, 11, 25])
@each(
    ("sampler", "name", "tolerance"),
    [(dpmpp_2m, "DPMSolverMultistepScheduler", 1e-5), (dpmpp_2s, "DPMSolverSinglestepScheduler", 1e-5)],
)
def test_dpm_solvers_agree_with_diffusers_from_the_clipped_start(oracle, sampler, name, tolerance, steps):
    schedule, x = cosine(1000), noise(4)
    denoise, timesteps = MIXTURE.denoiser(schedule), spaced_timesteps(schedule, steps)
    scheduler = theirs(name, schedule, solver_order=2, lower_order_final=True, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=timesteps)
    difference = rms(sampler(denoise, x, schedule, timesteps) - run_theirs(scheduler, denoise, x))
    oracle(f"{sampler.__name__}, cosine from λ = -5.1", f"diffusers {name}", difference, tolerance)


@each("make", [linear, cosine])
@each("steps", [2, 10, 11, 50])
def test_heun_agrees_with_diffusers(oracle, make, steps):
    schedule, x = make(1000), noise(5)
    denoise, timesteps = MIXTURE.denoiser(schedule), spaced_timesteps(schedule, steps)
    scheduler = theirs("HeunDiscreteScheduler", schedule)
    scheduler.set_timesteps(timesteps=timesteps)
    reference = x * (1 + scheduler.sigmas[0] ** 2).sqrt()  # its state is x / sqrt(alpha_bar)
    for t in scheduler.timesteps:  # all but the first and the last twice
        eps = denoise(scheduler.scale_model_input(reference, t), int(t))
        reference = scheduler.step(eps, t, reference).prev_sample
    difference = rms(heun(denoise, x, schedule, timesteps) - reference)
    oracle(f"heun, {make.__name__} from λ = -5.1", "diffusers HeunDiscreteScheduler", difference, 1e-5)


# Identities and closed forms


@each("make", [linear, cosine])
@each("steps", [20, 50, 1000])
@each("threshold", ["none", "static"])
def test_ddim_with_eta_1_is_ddpm(oracle, make, steps, threshold):
    schedule, x = make(1000), noise(6)
    denoise, timesteps = MIXTURE.denoiser(schedule), spaced_timesteps(schedule, steps)
    ours, reference = (
        sampler(denoise, x, schedule, timesteps, Sampling(drawn(1), THRESHOLDS[threshold], eta))
        for sampler, eta in ((ddim, 1.0), (ddpm, 0.0))
    )
    oracle("ddim, eta = 1", "ddpm, same noise", rms(ours - reference), 4e-13)


@each("name", SAMPLERS)
def test_one_step_gives_the_estimate_of_x_0(name):
    schedule, x = linear(1000), noise(7)
    denoise, alpha_bar = MIXTURE.denoiser(schedule), float(schedule.alpha_bar[700])
    x_0 = SAMPLERS[name](denoise, x, schedule, [700], Sampling(step_noise=drawn(1)))
    expected = (x - math.sqrt(1 - alpha_bar) * denoise(x, 700)) / math.sqrt(alpha_bar)
    torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-13)


def log_snr_grid_error(sampler: str, intervals: int) -> float:
    """Mean error of an integration from t = 0.9 T to 0.05 T on a grid even in log-SNR; the exact flow is known."""
    schedule = linear(100_000)  # so many timesteps that the nearest one lies on the grid
    log_snr, alpha_bar, denoise = schedule.log_snr, schedule.alpha_bar.tolist(), MIXTURE.denoiser(schedule)
    targets = torch.linspace(float(log_snr[90_000]), float(log_snr[5_000]), intervals + 1, dtype=torch.float64)
    grid = [int((log_snr - target).abs().argmin()) for target in targets]
    x = noise(8)
    ours = SAMPLERS[sampler](denoise, x, schedule, grid)
    # The last step, from the end of the grid to the data, is the estimate of x_0 for every sampler.
    last = alpha_bar[grid[-1]]
    end = MIXTURE.flow(x, alpha_bar[grid[0]], last)
    return float((ours - (end - math.sqrt(1 - last) * denoise(end, grid[-1])) / math.sqrt(last)).abs().mean())


@each("intervals", [40, 80])
@each(
    ("sampler", "order", "tolerance"), [("ddim", 1, 0.15), ("dpmpp_2m", 2, 0.2), ("dpmpp_2s", 2, 0.2), ("heun", 2, 0.2)]
)
def test_order_of_convergence(oracle, sampler, order, tolerance, intervals):
    measured = math.log2(log_snr_grid_error(sampler, intervals) / log_snr_grid_error(sampler, 2 * intervals))
    oracle(f"{sampler}, order of convergence", f"{order}, by the exact flow", abs(measured - order), tolerance)


@each("make", [linear, cosine])
@each("name", DETERMINISTIC)
def test_all_steps_of_an_exact_denoiser_give_the_distribution_of_the_data(oracle, name, make):
    quantiles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    x = torch.special.ndtri(quantiles).reshape(-1, 1, 4, 4)  # a standard normal without sampling error
    schedule = make(1000)
    x_0 = SAMPLERS[name](MIXTURE.denoiser(schedule), x, schedule, spaced_timesteps(schedule, 1000))
    mean, variance = MIXTURE.moments
    moments = max(abs(float(x_0.mean()) - mean), abs(float(x_0.var()) - variance))
    oracle(f"{name}, T = 1000 steps, mean and variance", "the data's", moments, 2e-3)
    # The probability flow keeps quantiles: the k-th largest noise becomes the k-th largest pixel.
    error = (MIXTURE.cdf(x_0.flatten(), alpha_bar=1.0) - quantiles).abs().mean()
    oracle(f"{name}, T = 1000 steps, distribution function", "the data's", error, 2e-3)


@each("make", [linear, cosine])
@each(("name", "eta"), [*((name, 0.0) for name in STOCHASTIC), ("ddim", 0.5), ("ddim", 1.0)])
def test_all_steps_with_noise_give_the_moments_of_the_data(oracle, name, eta, make):
    schedule, x = make(250), noise(9, pixels=16_384)
    options = Sampling(step_noise=drawn(10), eta=eta)
    x_0 = SAMPLERS[name](MIXTURE.denoiser(schedule), x, schedule, spaced_timesteps(schedule, 250), options)
    mean, variance = MIXTURE.moments
    moments = max(abs(float(x_0.mean()) - mean), abs(float(x_0.var()) - variance))
    title = f"{name} with eta = {eta}" if name == "ddim" else name
    four_standard_errors = 4 * math.sqrt(variance / 16_384)
    oracle(f"{title}, T = 250 steps, mean and variance", "the data's", moments, four_standard_errors)


# What goes wrong elsewhere


@each("make", [linear, cosine])
def test_with_few_steps_beta_leaves_noise_that_the_network_is_not_told_of_and_beta_tilde_does_not(make):
    # As in images, what one pixel can be is narrow beside the noise of every step. The moment to look at is then that
    # of x_t around its mode when the network is asked for the last time: alpha_bar s^2 + 1 - alpha_bar.
    data, schedule = Mixture(sds=(0.02, 0.02)), make(1000)

    def last_variance(name: str, steps: int) -> tuple[float, float]:
        seen: list[tuple[int, torch.Tensor]] = []
        denoise, timesteps = watched(data.denoiser(schedule), seen), spaced_timesteps(schedule, steps)
        SAMPLERS[name](denoise, noise(11, pixels=4096), schedule, timesteps, Sampling(step_noise=drawn(12)))
        t, x_t = seen[-1]
        alpha_bar = float(schedule.alpha_bar[t])
        modes = math.sqrt(alpha_bar) * torch.tensor(data.means, dtype=x_t.dtype)
        found = (x_t[..., None] - modes).abs().amin(dim=-1).square().mean()
        return float(found), alpha_bar * 0.02**2 + 1 - alpha_bar

    for name in ("ddpm", "ddpm_beta"):
        found, expected = last_variance(name, 1000)
        assert abs(found - expected) < 2e-4
    found, expected = last_variance("ddpm", 50)
    assert abs(found / expected - 1) < 0.2
    found, expected = last_variance("ddpm_beta", 50)
    assert found / expected > 2


def test_a_small_error_of_the_network_moves_samples_only_if_the_start_is_not_clipped(oracle):
    schedule, x = cosine(1000), noise(13, pixels=16_384)
    denoise = MIXTURE.denoiser(schedule)

    def moved(clip_start: bool) -> float:
        draw, timesteps = drawn(14), spaced_timesteps(schedule, 20, clip_start=clip_start)
        off = ddim(lambda x, t: denoise(x, t) * (1 + 2e-3 * draw(0, x)), x, schedule, timesteps)
        return rms(off - ddim(denoise, x, schedule, timesteps))

    oracle("ddim, 20 steps from λ = -5.1, eps off by 0.2 %", "exact eps", moved(clip_start=True), 0.015)
    assert moved(clip_start=False) > 0.5


@each("name", SAMPLERS)
@each("threshold", THRESHOLDS)
@each("relative_error", [-2e-3, 2e-3])
def test_25_steps_on_the_cosine_schedule_stay_in_bounds(name, threshold, relative_error):
    schedule, x = cosine(1000), noise(15).float()  # up to 3.9

    def largest(clip_start: bool) -> tuple[float, float]:
        """Of x_t and of the estimates of x_0."""
        states: list[tuple[int, torch.Tensor]] = []
        estimates: list[tuple[int, torch.Tensor]] = []
        options = Sampling(drawn(16), THRESHOLDS[threshold], on_step=lambda *step: estimates.append(step))
        denoise = watched(imperfect(MIXTURE.denoiser(schedule), relative_error), states)
        SAMPLERS[name](denoise, x, schedule, spaced_timesteps(schedule, 25, clip_start=clip_start), options)
        return max(float(x.abs().max()) for _, x in states), max(float(x.abs().max()) for _, x in estimates)

    state, estimate = largest(clip_start=True)
    assert state < 5
    assert estimate < (1.5 if threshold == "none" else 1.000001)
    if threshold == "none":
        assert largest(clip_start=False)[1] > 100


# Thresholds


def test_dynamic_threshold_equals_a_loop_over_samples_and_pixels():
    x_0 = torch.randn((5, 3, 8, 8), dtype=torch.float64, generator=seeded()) * torch.tensor(
        [0.2, 0.4, 1, 2, 5]
    ).reshape(5, 1, 1, 1)
    ours = dynamic_threshold(x_0)
    for sample, result in zip(x_0.flatten(1).tolist(), ours.flatten(1).tolist(), strict=True):
        magnitudes = sorted(abs(value) for value in sample)
        place = 0.995 * (len(magnitudes) - 1)
        below = int(place)
        quantile = magnitudes[below] + (place - below) * (magnitudes[below + 1] - magnitudes[below])
        s = max(1.0, quantile)
        assert result == pytest.approx([min(max(value, -s), s) / s for value in sample], abs=1e-12)
    assert torch.equal(ours[0], x_0[0])  # in range already


@each("threshold", ["static", "dynamic"])
@each("name", SAMPLERS)
def test_a_threshold_keeps_the_result_in_range(name, threshold):
    schedule, x = linear(1000), noise(17).float()
    denoise, timesteps = imperfect(MIXTURE.denoiser(schedule), -0.3), spaced_timesteps(schedule, 9)
    free, kept = (
        SAMPLERS[name](denoise, x, schedule, timesteps, Sampling(drawn(18), THRESHOLDS[choice]))
        for choice in ("none", threshold)
    )
    assert free.abs().max() > 1.05
    assert kept.abs().max() <= 1


# The calls


@each("name", SAMPLERS)
@each("steps", [1, 2, 3, 10])
def test_the_network_is_asked_at_the_listed_timesteps_as_often_as_stated(name, steps):
    schedule, seen = linear(1000), []
    timesteps = spaced_timesteps(schedule, steps)
    SAMPLERS[name](watched(MIXTURE.denoiser(schedule), seen), noise(19), schedule, timesteps, Sampling(drawn(20)))
    asked = [t for t, _ in seen]
    assert len(asked) == network_evaluations(name, steps)
    assert list(dict.fromkeys(asked)) == timesteps


@each("name", SAMPLERS)
def test_on_step_counts_the_steps_and_ends_with_the_result(name):
    schedule, seen = linear(1000), []
    options = Sampling(drawn(21), on_step=lambda finished, x_0: seen.append((finished, x_0)))
    x_0 = SAMPLERS[name](MIXTURE.denoiser(schedule), noise(22), schedule, [900, 500, 300, 100], options)
    assert [finished for finished, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], x_0)
    assert not torch.equal(seen[0][1], x_0)


@each("name", SAMPLERS)
@each("dtype", [torch.float32, torch.float64])
def test_the_state_keeps_the_dtype_of_the_noise(name, dtype):
    schedule, seen = linear(1000), []
    denoise, timesteps = watched(MIXTURE.denoiser(schedule), seen), spaced_timesteps(schedule, 5)
    x_0 = SAMPLERS[name](denoise, noise(23).to(dtype), schedule, timesteps, Sampling(drawn(24)))
    assert {x.dtype for _, x in seen} == {x_0.dtype} == {dtype}


@each("name", SAMPLERS)
@each("threshold", THRESHOLDS)
@each("eta", [0.0, 0.5])
def test_no_value_is_read_from_the_device(name, threshold, eta):
    # Tensors on the meta device have no values: `.item()`, `bool()` or a copy to the CPU raises.
    x, schedule = torch.empty((2, 1, 4, 4), device="meta"), linear(1000)
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.sum().item()
    options = Sampling(lambda _, x: torch.empty_like(x), THRESHOLDS[threshold], eta, on_step=lambda _, x_0: None)
    x_0 = SAMPLERS[name](lambda x_t, t: 0.1 * x_t, x, schedule, spaced_timesteps(schedule, 6), options)
    assert x_0.device.type == "meta"


# Bad input


def must_not_be_asked(x: torch.Tensor, t: int) -> torch.Tensor:
    raise AssertionError("the network was asked before the input was checked")


@each("name", SAMPLERS)
@each(
    ("timesteps", "message"),
    [
        ([], "no timesteps: expected at least one"),
        ([1000, 500], "timestep 1000: expected 0 to 999"),
        ([500, -1], "timestep -1: expected 0 to 999"),
        ([500, 500], "timestep 500 follows 500: expected strictly decreasing"),
        ([100, 500], "timestep 500 follows 100: expected strictly decreasing"),
    ],
)
def test_impossible_timesteps_are_refused(name, timesteps, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](must_not_be_asked, noise(25), linear(1000), timesteps, Sampling(drawn(26)))


@each("name", STOCHASTIC)
def test_a_stochastic_sampler_without_noise_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} draws noise at every step: expected a function as step_noise"):
        SAMPLERS[name](must_not_be_asked, noise(27), linear(1000), [500, 100])


def test_eta_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"ddim with eta = 0.5 draws noise at every step"):
        Sampling(eta=0.5)


@each("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match=rf"eta = {eta}: expected 0 \(deterministic\) to 1"):
        Sampling(step_noise=drawn(28), eta=eta)
