import functools
import itertools
import re

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from darkroom.diffusion.schedules import cosine, linear, make_schedule
from darkroom.diffusion.timesteps import MIN_LOG_SNR, SPACINGS, spaced_timesteps

schedule_of = functools.cache(make_schedule)


@st.composite
def requests(draw):
    name = draw(st.sampled_from(["linear", "cosine"]))
    total = draw(st.integers(2 if name == "cosine" else 21, 2000))
    return schedule_of(name, total), draw(st.integers(1, total)), draw(st.sampled_from(SPACINGS))


@given(requests(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_request_gets_as_many_decreasing_timesteps_as_it_asked_for(request, clip_start):
    schedule, steps, spacing = request
    timesteps = spaced_timesteps(schedule, steps, spacing, clip_start=clip_start)
    assert len(timesteps) == steps
    assert all(type(t) is int for t in timesteps)
    assert all(earlier > later for earlier, later in itertools.pairwise(timesteps))
    assert timesteps[0] < schedule.num_timesteps
    assert timesteps[-1] >= 0


@given(requests())
@settings(max_examples=200, deadline=None)
def test_any_start_is_clear_of_the_end_unless_the_timesteps_below_run_out(request):
    schedule, steps, spacing = request
    start = spaced_timesteps(schedule, steps, spacing)[0]
    clear = int((schedule.log_snr >= MIN_LOG_SNR).sum())
    assert start < max(clear, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("make", [linear, cosine])
def test_as_many_steps_as_timesteps_are_all_of_them(make, spacing):
    assert spaced_timesteps(make(1000), 1000, spacing) == list(range(999, -1, -1))


def test_few_steps_on_the_cosine_schedule_start_at_995():
    for spacing in ("trailing", "linspace", "log_snr"):
        for steps in (1, 2, 10, 20, 50):
            assert spaced_timesteps(cosine(1000), steps, spacing)[0] == 995
            assert spaced_timesteps(cosine(1000), steps, spacing, clip_start=False)[0] == 999
    assert spaced_timesteps(cosine(1000), 20, "leading") == list(range(19 * 49, -1, -49))
    assert float(cosine(1000).log_snr[996]) < MIN_LOG_SNR <= float(cosine(1000).log_snr[995])


def test_the_whole_linear_schedule_is_clear_of_the_end():
    for spacing in SPACINGS:
        clipped, whole = (spaced_timesteps(linear(1000), 50, spacing, clip_start=clip) for clip in (True, False))
        assert clipped == whole


def ties(spacing, steps):
    """Where the timestep before rounding lies exactly halfway between two; numpy rounds its own error there."""
    numerator, denominator = {"trailing": (1000, steps), "linspace": (999, steps - 1), "leading": (1, 1)}[spacing]
    return [i * numerator % denominator * 2 == denominator for i in range(steps)]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacings_are_those_of_diffusers(spacing, oracle):
    reference, at_ties, elsewhere = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing), 0, 0
    for steps in range(2, 1001):
        reference.set_timesteps(steps)
        theirs = [t for t in reference.timesteps.tolist() if t >= 0]  # 61 trailing steps of theirs are 62, down to -1
        ours = spaced_timesteps(linear(1000), steps, spacing, clip_start=False)
        for a, b, tie in zip(ours, theirs, ties(spacing, steps), strict=True):
            at_ties, elsewhere = (max(at_ties, abs(a - b)), elsewhere) if tie else (at_ties, max(elsewhere, abs(a - b)))
    oracle(f"timesteps, {spacing}, N = 2 … 1000", "diffusers, but for ties", elsewhere, 0)
    oracle(f"timesteps, {spacing}, rounding of ties", "diffusers", at_ties, 1)


def test_linspace_and_log_snr_include_both_ends():
    for spacing in ("linspace", "log_snr"):
        for steps in (2, 3, 20, 999):
            timesteps = spaced_timesteps(linear(1000), steps, spacing)
            assert (timesteps[0], timesteps[-1]) == (999, 0)


def test_trailing_starts_at_the_end_and_leading_ends_at_the_start():
    for steps in (1, 3, 7, 20, 500):
        assert spaced_timesteps(linear(1000), steps, "trailing")[0] == 999
        assert spaced_timesteps(linear(1000), steps, "trailing")[-1] > 0
        assert spaced_timesteps(linear(1000), steps, "leading")[-1] == 0
        assert spaced_timesteps(linear(1000), steps, "leading")[0] < 999


@pytest.mark.parametrize("make", [linear, cosine])
def test_log_snr_steps_are_even_in_lambda(make, oracle):
    schedule, steps = make(1000), 10  # few enough that no two of them want the same timestep
    log_snr = schedule.log_snr
    timesteps = spaced_timesteps(schedule, steps, "log_snr")
    start, end = float(log_snr[timesteps[0]]), float(log_snr[0])
    worst = 0.0
    for i, t in enumerate(timesteps):
        target = start + (end - start) * i / (steps - 1)
        nearest = min(range(1000), key=lambda u: abs(float(log_snr[u]) - target))
        worst = max(worst, abs(t - nearest))
    oracle(f"log_snr, 10 steps, {make.__name__}", "nearest timesteps by search", worst, 0)


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("steps", [50, 300, 999])
def test_log_snr_steps_that_collide_take_the_next_free_timestep(make, steps):
    schedule = make(1000)
    timesteps = spaced_timesteps(schedule, steps, "log_snr", clip_start=False)
    log_snr = schedule.log_snr
    targets = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    for i, t in enumerate(timesteps):
        nearest = int((log_snr - targets[i]).abs().argmin())
        pushed_down = i > 0 and t == timesteps[i - 1] - 1 and nearest >= t
        held_up = t == steps - 1 - i and nearest <= t  # each of the remaining ones still needs a timestep below
        assert t == nearest or pushed_down or held_up


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match=re.escape(f"steps = {steps}: expected 1 to 1000")):
        spaced_timesteps(linear(1000), steps)


def test_an_unknown_spacing_is_refused_by_name():
    with pytest.raises(ValueError, match="spacing = 'karras': expected trailing or leading or linspace or log_snr"):
        spaced_timesteps(linear(1000), 20, "karras")
