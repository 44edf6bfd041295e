"""What a tick says, from sums that are known."""

import json
import math
import resource
import sys
import time

import pytest
import torch
from torch import nn

from darkroom.training.ticks import REPEATABLE, Meter, Tick, training_flops
from tests.unit.training.small import PARAMS


def meter(steps, step=0, flops=0.0):
    return Meter(PARAMS.model_copy(update={"steps": steps, "batch_size": 8}), torch.device("cpu"), step, flops, 1)


def test_means_are_over_the_updates_that_were_made():
    tick = meter(1000).tick(10, 1e-3, torch.tensor([12.0, 6.0, 4.0]))
    assert (tick.loss, tick.grad_norm, tick.skipped, tick.step, tick.images) == (2.0, 1.0, 4, 10, 80)


def test_the_last_tick_may_be_shorter():
    assert meter(1005).tick(1005, 1e-3, torch.tensor([10.0, 5.0, 0.0])).loss == 2.0


def test_a_tick_without_any_update_has_no_loss_and_is_still_json():
    tick = meter(1000).tick(10, 1e-3, torch.tensor([0.0, 0.0, 10.0]))
    assert math.isnan(tick.loss)
    row = json.loads(json.dumps(tick.row(), allow_nan=False))
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, 10)
    assert set(REPEATABLE) < set(row)
    assert "10 updates skipped" in str(tick)


def test_speed_is_of_the_steps_since_the_last_tick(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    measured = meter(1000, step=500)
    now[0] += 4
    assert measured.tick(510, 1e-3, torch.zeros(3)).images_per_second == 20.0
    now[0] += 1
    assert measured.tick(520, 1e-3, torch.zeros(3)).images_per_second == 80.0


def test_memory_is_the_most_that_the_process_has_held():
    held = torch.ones(2**27)  # 512 MiB
    memory = meter(1000).tick(10, 1e-3, torch.zeros(3)).memory
    assert memory > held.nbytes
    assert memory == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_the_share_of_the_peak_is_operations_done_over_operations_possible(monkeypatch):
    monkeypatch.setattr("darkroom.training.ticks.peak_flops", lambda precision, device: 1e6)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    measured = meter(1000, flops=1e4)
    now[0] = 1.0
    tick = measured.tick(10, 1e-3, torch.zeros(3))  # 80 images a second of 1e4 operations each
    assert tick.mfu == pytest.approx(0.8)
    assert "80% of peak" in str(tick)


def test_a_training_step_counts_three_forward_passes_of_multiplications_and_additions():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x, t, labels):
            return self.conv(x)

    batch = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert training_flops(Network(), *batch) == 3 * 2 * (8 * 8) * (3 * 3 * 3) * 5


def test_a_tick_for_people_names_what_they_look_for():
    tick = Tick(10, 1280, 0.5, 1.25, 2e-4, 0, 3300.0, 5 * 2**30, 0.31)
    assert str(tick) == "loss 0.5000  gradient 1.25  rate 0.0002  3300 images/s  5.0 GiB  31% of peak"
