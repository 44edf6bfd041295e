"""One update: AdamW's formula, and nothing at all where loss or gradient is not finite."""

import math

import pytest
import torch
from torch import nn

from darkroom.training.state import TrainingState
from tests.unit.training.small import PARAMS


def make_state(**changes):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    return TrainingState(network, PARAMS.model_copy(update={"ema_snapshots": 2, **changes}))


def backward(state, scale=1.0):
    state.optimizer.zero_grad()
    loss = (state.network(torch.linspace(-1, 1, 6).reshape(2, 3)) * scale).square().mean()
    loss.backward()
    return loss.detach()


def copied(state):
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def test_an_update_is_adamw_with_the_clipped_gradient(oracle):
    state = make_state(weight_decay=0.1)
    for step, rate in ((1, 1e-2), (2, 2e-2), (3, 5e-3)):
        loss, before = backward(state, 10.0), copied(state)
        norm = torch.cat([p.grad.flatten() for p in state.network.parameters()]).norm().double()
        gradients = {name: p.grad.double() / norm for name, p in state.network.named_parameters()}
        assert norm > 1
        state.update(step, rate, loss, 1.0)
        for name, gradient in gradients.items():
            m = 0.9 * before[f"optimizer.exp_avg.{name}"].double() + 0.1 * gradient
            v = 0.999 * before[f"optimizer.exp_avg_sq.{name}"].double() + 0.001 * gradient**2
            expected = before[f"raw.{name}"].double() * (1 - rate * 0.1)
            expected -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            found = state.tensors()[f"raw.{name}"].double()
            difference = float((found - expected).norm() / expected.norm())
            oracle("an update of the weights", "AdamW with clipping in float64, relative", difference, 1e-6)
    assert state.sums.tolist()[2] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "norm"])
def test_what_is_not_finite_changes_no_weight_and_no_moment_and_is_counted(bad, where):
    state = make_state()
    state.update(1, 1e-2, backward(state), 1.0)
    before, loss = copied(state), backward(state)
    if where == "loss":
        loss = loss + bad
    else:
        value = bad if where == "gradient" else 1e30 * (1 if math.isnan(bad) else math.copysign(1, bad))
        next(state.network.parameters()).grad[0] = value  # 1e30 is finite, its square is not
    state.update(2, 1e-2, loss, 1.0)
    after = state.tensors()
    for name, tensor in before.items():
        if name.startswith(("raw.", "optimizer.")):
            assert torch.equal(after[name], tensor), name
        assert bool(after[name].isfinite().all()), name
    assert state.sums.tolist() == [*before["sums"].tolist()[:2], 1.0]
    assert state.skipped_in_a_row.item() == 1

    state.update(3, 1e-2, backward(state), 1.0)
    assert state.skipped_in_a_row.item() == 0
    assert state.sums.tolist()[2] == 1.0


def test_a_skipped_update_counts_for_no_later_one():
    """The optimizer's own count of steps stands still too, which its bias correction needs."""
    with_gap, without = make_state(), make_state()
    for state, losses in ((with_gap, (0.0, math.nan, 0.0)), (without, (0.0, 0.0))):
        for step, extra in enumerate(losses, start=1):
            state.update(step, 1e-2, backward(state) + extra, 1.0)
    for name, tensor in without.tensors().items():
        if name.startswith(("raw.", "optimizer.")):
            assert torch.equal(with_gap.tensors()[name], tensor), name


def test_no_finite_gradient_makes_weights_run_away():
    state = make_state()
    start = copied(state)
    for step in range(1, 200):
        loss = backward(state)
        for parameter in state.network.parameters():
            parameter.grad.mul_(10.0 ** (step % 19))
        state.update(step, 0.1, loss, 1e18)
    for name, _ in state.network.named_parameters():
        moved = (state.tensors()[f"raw.{name}"] - start[f"raw.{name}"]).abs().max()
        assert moved < 200 * 0.1 * 10


def test_what_was_loaded_is_what_was_there():
    state, other = make_state(), make_state()
    for step in (1, 2):
        state.update(step, 1e-2, backward(state), 1.0)
    other.load(copied(state))
    for training in (state, other):
        training.update(3, 1e-2, backward(training), 1.0)
    for name, tensor in state.tensors().items():
        assert torch.equal(other.tensors()[name], tensor), name
    assert {name.split(".")[0] for name in state.tensors()} == {
        "raw",
        "ema",
        "power",
        "optimizer",
        "sums",
        "skipped_in_a_row",
        "in_bf16",
    }
