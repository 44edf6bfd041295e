import math
from itertools import pairwise

import diffusers
import pytest
import torch

from darkroom.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, spaced_timesteps
from darkroom.diffusion.schedules import Schedule, cosine, linear
from tests.unit.diffusion.mixture import Mixture

MIXTURE = Mixture()
SHAPE = (64, 1, 4, 4)


def exact(schedule: Schedule):
    """The exact denoiser of the mixture under a schedule."""
    alpha_bar = schedule.alpha_bar
    return lambda x, t: MIXTURE.eps(x, float(alpha_bar[int(t[0])]))


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def no_noise(step, x):
    raise AssertionError("a deterministic sampler asked for noise")


def theirs(name: str, schedule: Schedule, **settings):
    """A diffusers scheduler over our betas."""
    return getattr(diffusers, name)(
        num_train_timesteps=schedule.num_timesteps, trained_betas=schedule.betas.numpy(), **settings
    )


def rms(difference: torch.Tensor) -> float:
    """Root mean square: single pixels between two modes of the mixture amplify the rounding of float32 tables."""
    return float(difference.square().mean().sqrt())


def run_theirs(scheduler, schedule, x, timesteps, **step_arguments):
    denoise = exact(schedule)
    for t in timesteps:
        x = scheduler.step(denoise(x, torch.tensor([int(t)])), int(t), x, **step_arguments).prev_sample
    return x


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("steps", [10, 50, 100])
def test_ddim_agrees_with_diffusers(make, steps):
    schedule, x = make(1000), noise(0)
    timesteps = list(range(1000 - 1000 // steps, -1, -(1000 // steps)))
    scheduler = theirs("DDIMScheduler", schedule, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    ours = ddim(exact(schedule), x, schedule, timesteps, no_noise, clip=False)
    assert [int(t) for t in scheduler.timesteps] == timesteps
    assert rms(ours - run_theirs(scheduler, schedule, x, timesteps)) < 4e-6


def test_clipped_ddim_derives_the_noise_anew_as_diffusers_does():
    schedule, x = linear(1000), noise(1)
    timesteps = list(range(980, -1, -20))
    scheduler = theirs("DDIMScheduler", schedule, clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(50)

    def wrong(x, t):  # an imperfect network, so that clipping has something to do
        return 1.1 * exact(schedule)(x, t)

    ours = ddim(wrong, x, schedule, timesteps, no_noise, clip=True)
    reference = x
    for t in timesteps:
        eps = wrong(reference, torch.tensor([t]))
        reference = scheduler.step(eps, t, reference, use_clipped_model_output=True).prev_sample
    assert rms(ours - reference) < 4e-6


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize(("steps", "tolerance"), [(50, 2e-5), (1000, 3e-4)])
def test_ddpm_agrees_with_diffusers(make, steps, tolerance, monkeypatch):
    schedule, x = make(1000), noise(2)
    timesteps = list(range(1000 - 1000 // steps, -1, -(1000 // steps)))
    scheduler = theirs("DDPMScheduler", schedule, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(steps)
    draws = {step: noise(100 + step) for step in range(steps)}
    handed_out = iter(range(steps))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: draws[next(handed_out)])
    ours = ddpm(exact(schedule), x, schedule, timesteps, lambda step, _: draws[step], clip=False)
    assert rms(ours - run_theirs(scheduler, schedule, x, timesteps)) < tolerance


@pytest.mark.parametrize(("make", "tolerance"), [(linear, 1e-5), (cosine, 4e-4)])
@pytest.mark.parametrize("steps", [10, 25])
def test_dpm_solver_agrees_with_diffusers(make, tolerance, steps):
    schedule, x = make(1000), noise(3)
    scheduler = theirs(
        "DPMSolverMultistepScheduler",
        schedule,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    ours = dpmpp_2m(exact(schedule), x, schedule, timesteps, no_noise, clip=False)
    assert rms(ours - run_theirs(scheduler, schedule, x, timesteps)) < tolerance


def log_snr_grid_error(sampler, steps: int) -> float:
    """Global error on a grid that is even in log-SNR, from t = 900 to t = 50, against a very fine grid."""
    fine = 100_000
    schedule = linear(fine)  # so many timesteps that rounding the grid to one of them costs nothing
    log_snr = schedule.log_snr

    def grid(n: int) -> list[int]:
        targets = torch.linspace(float(log_snr[int(0.9 * fine)]), float(log_snr[int(0.05 * fine)]), n + 1).double()
        return [int((log_snr - target).abs().argmin()) for target in targets]

    def integrate(n: int) -> torch.Tensor:
        return sampler(exact(schedule), noise(4), schedule, grid(n), no_noise, clip=False)

    # The last step to alpha_bar = 1 is the same Tweedie estimate for every grid, so it compares the states before it.
    return float((integrate(steps) - integrate(2000)).abs().mean())


@pytest.mark.parametrize(("sampler", "low", "high"), [(ddim, 0.85, 1.15), (dpmpp_2m, 1.8, 2.3)])
def test_order_of_convergence(sampler, low, high):
    errors = [log_snr_grid_error(sampler, steps) for steps in (40, 80)]
    order = math.log2(errors[0] / errors[1])
    assert low < order < high


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("make", [linear, cosine])
def test_an_exact_denoiser_gives_the_moments_of_the_data(name, make):
    schedule = make(1000)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((2000, 1, 4, 4), dtype=torch.float64, generator=generator)

    def step_noise(step, x):
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    steps = 250 if name == "ddpm" else 50
    x_0 = SAMPLERS[name](exact(schedule), x, schedule, spaced_timesteps(schedule, steps), step_noise)
    mean, variance = MIXTURE.moments
    assert abs(float(x_0.mean()) - mean) < 0.015
    assert abs(float(x_0.var()) - variance) < 0.02


def test_few_steps_on_the_cosine_schedule_start_before_the_blow_up():
    schedule = cosine(1000)
    for steps in (5, 10, 20, 50, 250):
        timesteps = spaced_timesteps(schedule, steps)
        assert timesteps[0] == 995
        assert len(timesteps) == steps
        assert all(a > b for a, b in pairwise(timesteps))
        assert timesteps[-1] >= 0


def test_a_small_error_of_the_network_stays_small_on_the_cosine_schedule():
    schedule, x = cosine(1000), noise(6)
    timesteps = spaced_timesteps(schedule, 20)
    right = ddim(exact(schedule), x, schedule, timesteps, no_noise, clip=False)
    off = ddim(lambda x, t: exact(schedule)(x, t) * (1 + 2e-3), x, schedule, timesteps, no_noise, clip=False)
    assert (right - off).square().mean().sqrt() < 0.03


def test_all_timesteps_are_visited_when_nothing_is_skipped():
    assert spaced_timesteps(linear(1000), 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}: expected 1 to 1000"):
        spaced_timesteps(linear(1000), steps)


def test_progress_counts_every_step():
    seen: list[int] = []
    schedule = linear(1000)
    ddim(exact(schedule), noise(7), schedule, [900, 500, 100], no_noise, progress=seen.append)
    assert seen == [1, 2, 3]
