"""The choice among forms of a network, with trials whose time and losses are made up, and once with real ones."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from darkroom.training import kernels
from darkroom.training.kernels import FILE, PLAIN, STEPS, VARIANTS, WORTHWHILE, Variant, choose, fastest
from tests.unit.nets.networks import SMALL
from tests.unit.nets.networks import network as make_network

LAST, COMPILED, BOTH = VARIANTS[1:]
ENOUGH = 10**9  # steps, so that trying pays


class Made:
    """Trials that take `seconds` a step, lose `losses` and have `gradients`, by variant; which variants were tried."""

    def __init__(self, monkeypatch, seconds, losses=None, gradients=None):
        self.seconds, self.losses, self.gradients = seconds, losses or {}, gradients or {}
        self.now, self.tried, self.current = 0.0, [], PLAIN
        monkeypatch.setattr(kernels.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(Variant, "apply", lambda variant, network: self.begin(variant))

    def begin(self, variant):
        self.current = variant
        self.tried.append(variant)

    def __call__(self, network, steps):
        seconds = self.seconds[self.current]
        if isinstance(seconds, Exception):
            raise seconds
        self.now += steps * seconds
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, self.gradients.get(self.current, 1.0))
        return [torch.tensor(self.losses.get(self.current, 1.0))] * steps


def search(made, steps=ENOUGH):
    return fastest(nn.Linear(2, 2), made, steps, lambda: None)


@pytest.mark.parametrize("best", VARIANTS)
def test_the_fastest_is_taken(monkeypatch, best):
    made = Made(monkeypatch, {variant: 0.5 if variant == best else 1.0 for variant in VARIANTS})
    assert search(made) == best
    assert made.tried == list(VARIANTS)


@pytest.mark.parametrize("loss", [1.02, 0.98, float("nan"), float("inf")])
def test_a_fast_one_with_another_loss_is_not(monkeypatch, loss):
    made = Made(monkeypatch, {PLAIN: 1.0, LAST: 0.9, COMPILED: 0.1, BOTH: 0.95}, {COMPILED: loss})
    assert search(made) == LAST


@pytest.mark.parametrize("gradient", [1.2, 0.0, -1.0, float("nan")])
def test_a_fast_one_with_another_gradient_is_not(monkeypatch, gradient):
    made = Made(monkeypatch, {PLAIN: 1.0, LAST: 0.9, COMPILED: 0.1, BOTH: 0.95}, gradients={COMPILED: gradient})
    assert search(made) == LAST


def test_one_that_does_not_work_here_is_out(monkeypatch):
    broken = RuntimeError("no compiler")
    assert search(Made(monkeypatch, {PLAIN: 1.0, LAST: 0.9, COMPILED: broken, BOTH: broken})) == LAST


def test_a_network_that_cannot_train_at_all_raises_its_own_error(monkeypatch):
    with pytest.raises(RuntimeError, match="out of everything"):
        search(Made(monkeypatch, dict.fromkeys(VARIANTS, RuntimeError("out of everything"))))


def test_for_a_short_training_nothing_else_is_tried(monkeypatch):
    made = Made(monkeypatch, {PLAIN: 1.0, LAST: 0.1, COMPILED: 0.1, BOTH: 0.1})
    assert search(made, int(WORTHWHILE) - 1) == PLAIN
    assert made.tried == [PLAIN]


def test_the_choice_is_kept_for_the_same_device_and_torch_only(monkeypatch, tmp_path):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    made = Made(monkeypatch, {PLAIN: 1.0, LAST: 0.9, COMPILED: 0.5, BOTH: 0.7})
    assert choose(nn.Linear(2, 2), made, ENOUGH, tmp_path, gpu) == COMPILED
    made.tried.clear()
    assert choose(nn.Linear(2, 2), made, ENOUGH, tmp_path, gpu) == COMPILED
    assert made.tried == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another card")
    made.seconds = dict.fromkeys(VARIANTS, 1.0)
    assert choose(nn.Linear(2, 2), made, ENOUGH, tmp_path, gpu) == PLAIN
    (tmp_path / FILE).write_text("{")
    assert choose(nn.Linear(2, 2), made, ENOUGH, tmp_path, gpu) == PLAIN


def test_on_a_processor_the_network_stays_as_it_is(monkeypatch, tmp_path):
    made = Made(monkeypatch, dict.fromkeys(VARIANTS, 1.0))
    assert choose(nn.Linear(2, 2), made, ENOUGH, tmp_path, torch.device("cpu")) == PLAIN
    assert (made.tried, list(tmp_path.iterdir())) == ([], [])


# Compiling takes minutes; in front of the compiler is what torch makes of the network, forwards and backwards.
@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        (LAST, None),
        (BOTH, "aot_eager"),
        pytest.param(COMPILED, "inductor", marks=pytest.mark.soak),
        pytest.param(BOTH, "inductor", marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_every_form_is_the_same_function_with_the_same_gradients(variant, backend, oracle, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = make_network(SMALL | {"num_res_blocks": 1}).train().requires_grad_(True)  # every kind of layer is there
    other = copy.deepcopy(plain)
    variant.apply(other)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 9]), torch.tensor([0, 1, 2])
    for network in (plain, other):
        network(x, t, labels).square().mean().backward()
    a, b = (torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) for network in (plain, other))
    oracle(f"gradients, {variant}", "eager, relative", float((a - b).norm() / a.norm()), 1e-5)


def test_a_variant_that_learns_nothing_is_found_out_in_a_real_trial(monkeypatch):
    """With layers that start at zero and a warm-up, losses alone would hardly tell."""
    from tests.unit.training.small import small_work

    work, network = small_work(learning_rate=2e-4, lr_warmup_steps=5000)

    def broken(variant, copied):
        if variant != PLAIN:
            for parameter in list(copied.parameters())[:-2]:
                parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(kernels, "WORTHWHILE", 0.0)
    monkeypatch.setattr(Variant, "apply", broken)
    assert fastest(network, work.trial, STEPS, lambda: None) == PLAIN


def test_a_trial_leaves_the_network_as_it_is():
    network = nn.Conv2d(3, 4, 3)
    before = [parameter.clone() for parameter in network.parameters()]

    def trial(copied, steps):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
                parameter.grad = torch.ones_like(parameter)
        return [torch.ones(())] * steps

    assert fastest(network, trial, STEPS, lambda: None) == PLAIN
    for parameter, kept in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
        assert parameter.is_contiguous()
