"""Which timesteps a sampler visits: decreasing lists of integers, in the spacings that are in use."""

import torch

from darkroom.diffusion.schedules import Schedule

SPACINGS = ("trailing", "leading", "linspace", "log_snr")
MIN_LOG_SNR = -5.1  # few-step samplers start here: at the end of the cosine schedule 1/sqrt(alpha_bar) is 20,291


def spaced_timesteps(
    schedule: Schedule, steps: int, spacing: str = "trailing", *, clip_start: bool = True
) -> list[int]:
    """`steps` timesteps in strictly decreasing order, over those with log_snr >= MIN_LOG_SNR.

    With `clip_start=False`, and with `steps` = T, all T timesteps count. Of the U that count,

    - trailing takes round(U, U - U/N, …) - 1: the start always, t = 0 only when almost all are taken;
    - leading takes 0, U//N, 2 (U//N), …: t = 0 always, the start only when all are taken, so that a sampler is told of
      less noise than it is given (a single step of t = 0);
    - linspace takes both ends, evenly in t (the three names are those of Lin 2024, table 2);
    - log_snr takes both ends, evenly in lambda, at the nearest timesteps that are still free (Lu 2022).

    Of the last two a single step is the start. Raises ValueError for another spacing and unless 1 <= `steps` <= T.
    """
    total = schedule.num_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps = {steps}: expected 1 to {total}, the number of timesteps of the schedule")
    # The list may need more timesteps than lie above the limit; then it takes the next ones.
    usable = max(steps, int((schedule.log_snr >= MIN_LOG_SNR).sum())) if clip_start else total
    if spacing == "trailing":
        return [round(usable - i * usable / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (usable // steps) for i in range(steps)][::-1]
    if spacing == "linspace":
        return [round(usable - 1 - i * (usable - 1) / max(steps - 1, 1)) for i in range(steps)]
    if spacing == "log_snr":
        return _even_in_log_snr(schedule, usable, steps)
    raise ValueError(f"spacing = {spacing!r}: expected {' or '.join(SPACINGS)}")


def _even_in_log_snr(schedule: Schedule, usable: int, steps: int) -> list[int]:
    log_snr = schedule.log_snr[:usable]
    targets = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    nearest = [int((log_snr - target).abs().argmin()) for target in targets]
    timesteps: list[int] = []
    free = usable - 1  # the largest timestep that is not taken
    for i, t in enumerate(nearest):
        # Where lambda moves fast, neighbours share a timestep: go on below, but leave one for each that still follows.
        timesteps.append(max(min(t, free), steps - 1 - i))
        free = timesteps[-1] - 1
    return timesteps
