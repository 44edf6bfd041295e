import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from darkroom.diffusion.schedules import cosine
from darkroom.errors import InputError, Interrupted, StageFailed
from darkroom.files import read_json
from darkroom.randomness import Purpose, integers, normal
from darkroom.training import checkpoints, loop
from darkroom.training.batches import DataOrder
from darkroom.training.ema import EMA, decay_at
from darkroom.training.history import History
from darkroom.training.loop import PATIENCE, Saving, learning_rate
from darkroom.training.state import TrainingState
from darkroom.training.ticks import REPEATABLE, steps_per_tick
from tests.unit.training.small import EVERY_STEP, FINGERPRINT, PARAMS, small_training


def weights(trained):
    return {**trained.raw.state_dict(), **{f"ema.{k}": v for k, v in trained.ema.state_dict().items()}}


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def repeatable(ticks):
    return [{key: tick.row()[key] for key in REPEATABLE} for tick in ticks]


def stop_by_signal(step, number=signal.SIGTERM):
    def on_tick(tick):
        if tick.step == step:
            os.kill(os.getpid(), number)

    return on_tick


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_interrupted_training_ends_bitwise_equal(tmp_path, dropout):
    ticks, again = [], []
    whole = small_training(tmp_path / "a", dropout=dropout, on_tick=ticks.append)
    with pytest.raises(Interrupted, match="stopped at step 7 of 12, state saved"):
        small_training(tmp_path / "b", dropout=dropout, on_tick=stop_by_signal(7))
    resumed = small_training(tmp_path / "b", dropout=dropout, on_tick=again.append)
    assert_bitwise_equal(weights(whole), weights(resumed))
    assert repeatable(again) == repeatable(tick for tick in ticks if tick.step > 7)


def test_every_step_is_told_and_where_a_training_starts(tmp_path):
    steps, again = [], []
    with pytest.raises(Interrupted):
        small_training(tmp_path, on_tick=stop_by_signal(7), on_step=steps.append)
    small_training(tmp_path, on_step=again.append)
    assert steps == list(range(8))
    assert again == list(range(7, 13))


@pytest.mark.parametrize("changes", [{"prediction": "v"}, {"prediction": "x_0", "loss_weighting": "min_snr"}])
def test_an_interrupted_training_ends_bitwise_equal_with_every_objective(tmp_path, changes):
    whole = small_training(tmp_path / "a", **changes)
    with pytest.raises(Interrupted):
        small_training(tmp_path / "b", on_tick=stop_by_signal(7), **changes)
    resumed = small_training(tmp_path / "b", **changes)
    assert_bitwise_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("loss_weighting", ["simple", "min_snr"])
def test_the_reported_loss_is_the_brute_force_loss_of_the_first_step(tmp_path, prediction, loss_weighting, oracle):
    """The network's output is zero before its first step, so the loss is the weighted mean square of the target."""
    ticks = []
    small_training(tmp_path, on_tick=ticks.append, steps=1, prediction=prediction, loss_weighting=loss_weighting)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=generator)
    samples = torch.arange(PARAMS.batch_size)
    noise = normal(PARAMS.seed, Purpose.TRAINING_NOISE, samples, (1, 8, 8))
    timesteps = integers(PARAMS.seed, Purpose.TIMESTEP, samples, 100)
    total = 0.0
    for g, image in enumerate(DataOrder(PARAMS.seed, 20)(samples).tolist()):
        a = float(cosine(100).alpha_bar[timesteps[g]])
        x_0, eps, snr = images[image].double() / 127.5 - 1, noise[g].double(), a / (1 - a)
        target = {"eps": eps, "x_0": x_0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x_0}[prediction]
        weight = {"eps": min(5 / snr, 1), "x_0": min(snr, 5), "v": min(snr, 5) / (snr + 1)}[prediction]
        total += float(target.square().mean()) * (weight if loss_weighting == "min_snr" else 1)
    difference = abs(ticks[0].loss / (total / len(samples)) - 1)
    oracle(f"first loss of a training, {prediction}, {loss_weighting}", "in a loop, relative", difference, 1e-6)


def test_ctrl_c_saves_too(tmp_path):
    with pytest.raises(Interrupted):
        small_training(tmp_path, on_tick=stop_by_signal(3, signal.SIGINT))
    assert checkpoints.load_newest(tmp_path, FINGERPRINT).step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_resume_after_kill_9_is_bitwise_equal(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.training.small import *\n"
        "small_training(Path(sys.argv[1]), saving=EVERY_STEP,"
        " on_tick=lambda tick: os.kill(os.getpid(), signal.SIGKILL) if tick.step == 9 else None)"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "b"], check=False, cwd=Path.cwd())
    assert killed.returncode == -signal.SIGKILL
    steps: list[int] = []
    whole = small_training(tmp_path / "a")
    resumed = small_training(tmp_path / "b", on_resume=steps.append)
    assert 0 < steps[0] < 12
    assert_bitwise_equal(weights(whole), weights(resumed))


def test_a_finished_training_is_not_trained_again(tmp_path):
    first, ticks = small_training(tmp_path), []
    second = small_training(tmp_path, on_tick=ticks.append)
    assert ticks == []
    assert_bitwise_equal(weights(first), weights(second))


def test_the_largest_seed_works_with_dropout(tmp_path):
    small_training(tmp_path, dropout=0.2, seed=2**63 - 1, steps=2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_training_ends_bitwise_equal_on_a_gpu(tmp_path, gpu, precision):
    changes = {"device": gpu, "precision": precision, "dropout": 0.2}
    whole = small_training(tmp_path / "a", **changes)
    with pytest.raises(Interrupted):
        small_training(tmp_path / "b", on_tick=stop_by_signal(7), **changes)
    resumed = small_training(tmp_path / "b", **changes)
    assert_bitwise_equal(weights(whole), weights(resumed))


def poison(monkeypatch, steps):
    """Put a NaN into a gradient of these steps (from 1)."""
    real = loop._Work.gradients

    def gradients(self, model, step):
        loss = real(self, model, step)
        if step + 1 in steps:
            next(model.parameters()).grad.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(loop._Work, "gradients", gradients)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_the_training_goes_on(tmp_path, monkeypatch):
    poison(monkeypatch, {5, 6})
    ticks = []
    trained = small_training(tmp_path, on_tick=ticks.append)
    assert [tick.skipped for tick in ticks] == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert [tick.row()["grad_norm"] is None for tick in ticks] == [tick.skipped == 1 for tick in ticks]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trained).values())


def test_a_training_that_stays_not_finite_stops_with_its_losses_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    good_until, ticks = 10, []
    poison(monkeypatch, set(range(good_until + 1, 1000)))
    with pytest.raises(StageFailed) as error:
        small_training(tmp_path, steps=60, saving=EVERY_STEP, on_tick=ticks.append)
    assert ticks[-1].step == good_until + PATIENCE
    message = str(error.value)
    assert f"not finite for {PATIENCE} updates in a row up to step {good_until + PATIENCE}" in message
    assert "train.learning_rate may be too high" in message
    assert f"nan at step {good_until + PATIENCE}" in message
    assert str(tmp_path) in message
    kept = checkpoints.load_newest(tmp_path, FINGERPRINT)
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors.values())
    with pytest.raises(StageFailed):  # again: what was counted is in the checkpoint
        small_training(tmp_path, steps=60, on_tick=ticks.append)
    assert ticks[-1].step == good_until + PATIENCE


def test_a_training_shorter_than_the_patience_does_not_pass_as_trained(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(StageFailed, match="not finite for 12 updates in a row up to step 12"):
        small_training(tmp_path)


@pytest.mark.parametrize("sizes", [(1, 4, 100), pytest.param((2, 8), marks=pytest.mark.soak)])
def test_micro_batches_train_the_same(tmp_path, sizes, oracle):
    whole = []
    one = small_training(tmp_path / "whole", steps=50, on_tick=whole.append)
    for micro_batch in sizes:
        divided = []
        other = small_training(tmp_path / f"{micro_batch}", steps=50, on_tick=divided.append, micro_batch=micro_batch)
        _check_that_they_train_the_same(one, other, whole, divided, oracle)


def _check_that_they_train_the_same(one, other, whole, divided, oracle):
    for name, tensor in weights(one).items():
        difference = float((weights(other)[name] - tensor).norm() / tensor.norm())
        oracle("weights after 50 steps with micro-batches", "without, relative", difference, 1e-5)
    for a, b in zip(whole, divided, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)


def test_micro_batches_that_do_not_divide_the_batch_are_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"DARKROOM_MICRO_BATCH: 3 images does not divide train\.batch_size = 8"):
        small_training(tmp_path, micro_batch=3)


def test_an_interrupted_training_with_snapshots_and_micro_batches_ends_bitwise_equal(tmp_path):
    changes = {"ema_snapshots": 3, "micro_batch": 4}
    whole = small_training(tmp_path / "a", **changes)
    with pytest.raises(Interrupted):
        small_training(tmp_path / "b", on_tick=stop_by_signal(7), **changes)
    resumed = small_training(tmp_path / "b", **changes)
    assert_bitwise_equal(weights(whole), weights(resumed))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "snapshots").iterdir())
    assert len(files) == 7  # three steps of two widths, and the index
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_a_resume_without_its_snapshots_fails_at_once_and_names_them(tmp_path):
    with pytest.raises(Interrupted):
        small_training(tmp_path, on_tick=stop_by_signal(7), ema_snapshots=3)
    (tmp_path / "snapshots" / "step-000000004-width-0.050.safetensors").unlink()
    with pytest.raises(StageFailed, match=r"lacks step-000000004-width-0\.050\.safetensors; remove it to train again"):
        small_training(tmp_path, ema_snapshots=3)


def test_checkpoints_are_written_every_so_many_steps(tmp_path):
    small_training(tmp_path, saving=Saving(every_seconds=1e9, every_steps=5, cost=1e9))
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["step-000000010.json", "step-000000012.json"]


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch, gpu, never_waiting):
    """torch raises at whatever waits while a step is put on its way; only ticks and saves may."""
    steps = []

    def guarded(method):
        def call(*arguments):
            steps.append(method)
            with never_waiting() if len(steps) > 10 else nullcontext():  # libraries set themselves up at first
                return method(*arguments)

        return call

    monkeypatch.setattr(loop._Work, "gradients", guarded(loop._Work.gradients))
    monkeypatch.setattr(TrainingState, "update", guarded(TrainingState.update))
    small_training(tmp_path, device=gpu, steps=40, ema_snapshots=2, horizontal_flip=True)
    assert len(steps) > 70


def test_vouchers_hold_what_is_needed_to_check_a_file(tmp_path):
    small_training(tmp_path)
    voucher = read_json(tmp_path / "step-000000012.json")
    assert voucher["step"] == 12
    assert voucher["fingerprint"] == FINGERPRINT
    assert load_file(tmp_path / "step-000000012.safetensors").keys() > {"sums"}


def test_ema_is_the_brute_force_average_of_the_trajectory():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema, trajectory = EMA(network, 0.9), [network[0].weight.detach().clone()]
    for step in range(1, 30):
        with torch.no_grad():
            network[0].weight.add_(torch.randn(2, 3))
            network[1].running_mean.add_(1.0)
        ema.update(network, step)
        trajectory.append(network[0].weight.detach().clone())
    average = trajectory[0].double()
    for step in range(1, 30):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * trajectory[step].double()
    assert torch.allclose(ema.network[0].weight.double(), average, atol=1e-6)
    assert torch.equal(ema.network[1].running_mean, network[1].running_mean)


def test_ema_warm_up_forgets_the_initial_weights():
    kept = 1.0
    for step in range(1, 1001):
        kept *= decay_at(step, 0.9999)
    assert kept < 1e-6


def test_learning_rate_warms_up_and_decays():
    params = PARAMS.model_copy(update={"steps": 100, "lr_warmup_steps": 9, "lr_decay": "cosine", "learning_rate": 1.0})
    assert learning_rate(params, 0) == pytest.approx(0.1)
    assert learning_rate(params, 50) == pytest.approx(0.5)
    assert learning_rate(params, 99) < 0.001
    constant = params.model_copy(update={"lr_decay": "constant"})
    assert learning_rate(constant, 99) == 1.0


@pytest.mark.parametrize(("steps", "per_tick"), [(1, 1), (12, 1), (1000, 10), (800_000, 100)])
def test_ticks_are_a_function_of_the_length(steps, per_tick):
    assert steps_per_tick(steps) == per_tick


def test_history_drops_what_is_repeated_and_what_a_crash_cut_short(tmp_path):
    history = History(tmp_path / "h.jsonl")
    for step in (1, 2, 3):
        history.append({"step": step, "loss": step / 2})
    with history.path.open("a") as file:
        file.write('{"step": 4, "lo')
    history.truncate(2)
    history.append({"step": 3, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in history.rows()] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_history_survives_a_full_disk_and_a_line_that_was_cut_short(tmp_path, monkeypatch, caplog):
    history = History(tmp_path / "h.jsonl")
    history.append({"step": 1, "loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        history.append({"step": 2, "loss": 2.0})
        history.append({"step": 3, "loss": 3.0})
    assert [message for message in caplog.messages if "No space left on device; training goes on" in message]
    assert len(caplog.messages) == 1
    with history.path.open("a") as file:
        file.write('{"step": 4, "lo')
    history.append({"step": 4, "loss": 4.0})
    assert [row["loss"] for row in history.rows()] == [1.0, 2.0, 3.0, 4.0]
