"""The denoising as a film: how the estimate of x_0 turns from a blur into an image."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from darkroom.diffusion.pixels import to_uint8
from darkroom.evaluation.grid import grid_image

MAX_FRAMES = 48
STRIP_FRAMES = 12
FRAME_MS, LAST_FRAME_MS = 120, 2000


class Film:
    """Collects the estimates of x_0 during a draw; give `record` to `DiffusionModel.draw` as `on_step`."""

    def __init__(self, steps: int) -> None:
        self._frames: dict[int, list[Tensor]] = {step: [] for step in _spread(steps, MAX_FRAMES)}

    def record(self, step: int, x_0: Tensor) -> None:
        """Keep the estimate x_0 (n, C, H, W) in [-1, 1] after `step` finished steps, if that step is a frame."""
        if step in self._frames:
            self._frames[step].append(to_uint8(x_0).cpu())

    def frames(self) -> list[Tensor]:
        """The frames in their order: uint8 (N, C, H, W) each, N over all batches."""
        return [torch.cat(batches) for batches in self._frames.values()]

    def write_gif(self, path: Path, labels: Tensor, rows: Mapping[int, str]) -> None:
        """An endless GIF of the grid, which rests on the finished images."""
        pictures = [grid_image(frame, labels, rows) for frame in self.frames()]
        durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
        pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)

    def write_strip(self, path: Path, labels: Tensor, rows: Mapping[int, str]) -> None:
        """A PNG with a row per class, its first image from the first step on the left to the last on the right."""
        frames = self.frames()
        chosen = [frames[number - 1] for number in _spread(len(frames), STRIP_FRAMES)]
        first = [int((labels == label).nonzero()[0]) for label in rows]
        images = torch.cat([frame[first] for frame in chosen])
        grid_image(images, torch.tensor(list(rows)).repeat(len(chosen)), rows).save(path, "PNG", optimize=True)


def _spread(total: int, count: int) -> list[int]:
    """At most `count` of 1 … total, evenly, the last one always among them."""
    count = min(total, count)
    return [round((number + 1) * total / count) for number in range(count)]
