import re
import shutil

import numpy as np
import pytest
import torch

from darkroom.diffusion.model import DiffusionModel
from darkroom.errors import InputError
from darkroom.files import digest_file, read_json, write_json
from darkroom.training.ema import PowerEMA, gamma_of
from darkroom.training.posthoc import (
    MAX_RESIDUAL,
    open_snapshots,
    plan_average,
    profile_dot,
    reconstruct,
    solve,
    write_model,
)
from darkroom.training.snapshots import Snapshot, Snapshots, snapshot_steps, write_snapshot
from tests.integration.registry_project import make_project
from tests.integration.registry_project import write_model as write_trained
from tests.unit.training.small import FINGERPRINT
from tests.unit.training.trajectory import average, flat, make_network, relative, walk

TOTAL = 400
COUNTS = (2, 4, 8, 16)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trajectory, its snapshots by their number, and the averages after its last step."""
    network = make_network()
    ema = PowerEMA(network)
    directories = {count: tmp_path_factory.mktemp(f"count-{count}") for count in COUNTS}

    def after(step):
        for count, directory in directories.items():
            if step in snapshot_steps(TOTAL, count):
                write_snapshot(directory, step, ema, FINGERPRINT)

    trajectory = walk(network, ema, TOTAL, after=after)
    return trajectory, {count: directory / "snapshots" for count, directory in directories.items()}, ema


def made(directory, width, step=None):
    """The reconstruction and its residual."""
    plan = plan_average(open_snapshots(directory), width, step)
    return reconstruct(directory, plan), plan.residual


@pytest.mark.parametrize("a", [(1.0, 0.05), (0.4, 0.1), (0.75, 0.25)])
@pytest.mark.parametrize("b", [(1.0, 0.05), (0.5, 0.02), (0.9, 0.1)])
def test_inner_products_of_profiles_are_the_integrals(a, b, oracle):
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000

    def profile(t, width):
        gamma = gamma_of(width)
        return np.where(tau <= t, (gamma + 1) * np.minimum(tau / t, 1) ** gamma / t, 0)

    integral = float(np.mean(profile(*a) * profile(*b)))
    closed = float(profile_dot(a[0], gamma_of(a[1]), b[0], gamma_of(b[1])))
    oracle("inner product of two profiles", "midpoint sum, relative", abs(closed / integral - 1), 1e-4)


def test_the_coefficients_are_the_best_in_a_discretised_least_squares(oracle):
    """On a fine grid of tau, with the sum enforced by writing the last coefficient as 1 minus the others."""
    tau = (np.arange(20_000) + 0.5) / 20_000
    t = np.repeat([0.25, 0.5, 0.75, 1.0], 2)
    gamma = np.tile([gamma_of(0.05), gamma_of(0.1)], 4)
    profiles = np.where(tau[:, None] <= t, (gamma + 1) * np.minimum(tau[:, None] / t, 1) ** gamma / t, 0)
    wanted = (gamma_of(0.08) + 1) * tau ** gamma_of(0.08)
    others = np.linalg.lstsq(profiles[:, :-1] - profiles[:, -1:], wanted - profiles[:, -1], rcond=None)[0]
    expected = np.append(others, 1 - others.sum())
    coefficients, residual = solve(t, gamma, 1.0, gamma_of(0.08))
    lacking = float(np.linalg.norm(wanted - profiles @ expected) / np.linalg.norm(wanted))
    oracle("post-hoc coefficients", "on a grid, absolute", np.abs(coefficients - expected).max(), 1e-6)
    oracle("post-hoc residual", "on a grid, relative", abs(residual / lacking - 1), 1e-5)


# The tolerances are the measured errors times 1.5, rounded up.
@pytest.mark.parametrize(
    ("width", "tolerances"),
    [
        (0.03, (5e-2, 3e-2, 1e-2, 2e-3)),
        (0.08, (1.1e-2, 4e-3, 7e-4, 8e-5)),
        (0.12, (1.6e-2, 5e-3, 6e-4, 8e-5)),
        (0.15, (5e-2, 1e-2, 1.5e-3, 2e-4)),
    ],
)
def test_another_width_is_the_brute_force_average_and_nearer_with_more_snapshots(recorded, width, tolerances, oracle):
    trajectory, directories, _ = recorded
    expected = average(trajectory, width)
    errors, residuals = [], []
    for count, tolerance in zip(COUNTS, tolerances, strict=True):
        tensors, residual = made(directories[count], width)
        errors.append(relative(flat(tensors), expected))
        residuals.append(residual)
        oracle(f"post-hoc EMA, width {width}, {count} snapshots", "brute force, relative", errors[-1], tolerance)
    assert errors == sorted(errors, reverse=True)
    assert residuals == sorted(residuals, reverse=True)


def test_it_is_far_nearer_than_the_nearest_stored_average(recorded):
    trajectory, directories, ema = recorded
    expected = average(trajectory, 0.07)
    tensors, _ = made(directories[8], 0.07)
    stored = [relative(flat(network.state_dict()), expected) for network in ema.networks.values()]
    assert relative(flat(tensors), expected) < min(stored) / 20


@pytest.mark.parametrize("width", [0.05, 0.1])
@pytest.mark.parametrize("count", COUNTS)
def test_a_stored_width_comes_out_as_it_was_stored(recorded, width, count, oracle):
    _, directories, ema = recorded
    tensors, residual = made(directories[count], width)
    stored = ema.networks[width].state_dict()
    assert tensors.keys() == stored.keys()
    oracle("post-hoc EMA of a stored width", "as stored, relative", relative(flat(tensors), flat(stored)), 1e-6)
    assert residual < 1e-6


def test_an_average_within_the_training_uses_the_snapshots_around_it(recorded, oracle):
    trajectory, directories, _ = recorded
    for step, tolerance in ((200, 1e-2), (195, 1e-2)):  # a snapshot's step, and one between two
        tensors, residual = made(directories[16], 0.2, step)
        error = relative(flat(tensors), average(trajectory[:step], 0.2))
        oracle(f"post-hoc EMA, width 0.2 at step {step} of 400", "brute force, relative", error, tolerance)
        assert residual < MAX_RESIDUAL


def test_buffers_are_those_of_the_last_snapshot_up_to_the_step(recorded):
    _, directories, _ = recorded
    for step, seen in ((400, 400), (200, 200), (195, 175)):
        tensors, _ = made(directories[16], 0.2, step)
        assert int(tensors["1.num_batches_tracked"]) == seen
        assert torch.equal(tensors["1.running_mean"], torch.full((10,), float(seen)))


def test_what_never_changed_comes_out_as_it_is(tmp_path, oracle):
    network = make_network()
    ema = PowerEMA(network)
    for step in (1, 2, 3):
        ema.update(network, step)
        write_snapshot(tmp_path, step, ema, FINGERPRINT)
    tensors, _ = made(tmp_path / "snapshots", 0.03)
    difference = relative(flat(tensors), flat(network.state_dict()))
    oracle("post-hoc EMA of constant weights", "the weights, relative", difference, 1e-6)


def index_of(steps, widths=(0.05, 0.1)):
    return Snapshots(FINGERPRINT, [Snapshot(step, width, "0" * 64) for step in steps for width in widths])


@pytest.mark.parametrize(
    ("index", "width", "step", "words"),
    [
        (index_of([]), 0.08, None, "lists no snapshot"),
        (index_of([50, 100]), 0.0, None, "EMA width 0.0: expected more than 0 and at most 0.25"),
        (index_of([50, 100]), 0.3, None, "EMA width 0.3: expected more than 0 and at most 0.25"),
        (index_of([50, 100]), 0.08, 49, "step 49: expected 50 to 100, the first and the last snapshot's"),
        (index_of([50, 100]), 0.08, 101, "step 101: expected 50 to 100"),
        (
            index_of([50, 100]),
            0.01,
            None,
            "width 0.010 at step 100: 2 snapshots of widths 0.050, 0.100 make it only with a residual of 0.61, allowed"
            " is 0.25; choose a width nearer to theirs, or train with more snapshots",
        ),
        (index_of([50, 100]), 0.08, 70, "choose a width nearer to theirs, a snapshot's step like 50, or train"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_line(index, width, step, words):
    with pytest.raises(InputError, match=re.escape(words)) as refused:
        plan_average(index, width, step)
    assert "\n" not in str(refused.value)


def test_a_width_below_the_stored_ones_is_made_when_there_are_snapshots_enough():
    assert plan_average(index_of(snapshot_steps(100, 64)), 0.01).residual < 0.1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"is damaged: sha256 is .* `dvc checkout` restores"),
        (lambda path: path.unlink(), r"0\.050\.safetensors: no such file; `dvc checkout` restores"),
        (lambda path: shutil.rmtree(path.parent), "holds no snapshots; set train.ema_snapshots above 0"),
    ],
)
def test_damaged_and_missing_snapshots_are_refused_by_name(recorded, tmp_path, damage, words):
    directory = shutil.copytree(recorded[1][2], tmp_path / "snapshots")
    damage(directory / "step-000000200-width-0.050.safetensors")
    with pytest.raises(InputError, match=words):
        made(directory, 0.08)


@pytest.mark.parametrize("key", ["fingerprint", "step"])
def test_an_index_that_lies_about_its_snapshots_is_refused(recorded, tmp_path, key):
    directory = shutil.copytree(recorded[1][2], tmp_path / "snapshots")
    index = read_json(directory / "snapshots.json")
    if key == "fingerprint":
        index["fingerprint"] = "e" * 64
    else:
        line, other = index["snapshots"][0], "step-000000150-width-0.050.safetensors"
        (directory / line["file"]).rename(directory / other)
        index["snapshots"][0] = line | {"file": other, "step": 150}
    write_json(directory / "snapshots.json", index)
    with pytest.raises(InputError, match=r"is of another training, step or width than snapshots\.json says"):
        made(directory, 0.1)


@pytest.fixture
def models(tmp_path):
    """A project's `models/` with a trained model and snapshots of its network."""
    workspace = make_project(tmp_path)
    write_trained(workspace, 1)
    model = DiffusionModel.load(workspace.models)
    ema = PowerEMA(model.network)
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(0.01)
        ema.update(model.network, step)
        write_snapshot(workspace.models, step, ema, model.card.fingerprint)
    return workspace.models


def write(models, target, width=0.08):
    return write_model(models, models / "snapshots", plan_average(open_snapshots(models / "snapshots"), width), target)


def test_the_model_directory_loads_and_says_what_it_was_made_of(models):
    trained, done = DiffusionModel.load(models).card, write(models, models / "ema-0.080")
    model, record = DiffusionModel.load(done.directory), read_json(done.directory / "ema.json")
    assert model.card == trained.model_copy(update={"weights_digest": done.weights_digest})
    assert digest_file(done.directory / "ema.safetensors") == done.weights_digest == record["weights_digest"]
    assert (done.width, done.step) == (record["width"], record["step"]) == (0.08, 4)
    assert record["fingerprint"] == trained.fingerprint
    assert record["trained_weights_digest"] == trained.weights_digest
    assert sum(part["coefficient"] for part in record["snapshots"]) == pytest.approx(1)
    lines = read_json(models / "snapshots" / "snapshots.json")["snapshots"]
    assert [part["sha256"] for part in record["snapshots"]] == [line["sha256"] for line in lines]
    assert write(models, models / "ema-0.080") == done, "an earlier reconstruction is written over, equal"


def test_nothing_else_is_written_over(models):
    before = sorted(models.rglob("*"))
    for target in (models, models / "snapshots"):
        with pytest.raises(InputError, match="holds files that are not an earlier reconstruction's"):
            write(models, target)
    with pytest.raises(InputError, match="is a file; expected a directory"):
        write(models, models / "model.json")
    assert sorted(models.rglob("*")) == before


def test_snapshots_of_another_training_than_the_model_are_refused(models):
    write_json(models / "model.json", read_json(models / "model.json") | {"fingerprint": "e" * 64})
    with pytest.raises(InputError, match=r"snapshots: is of training 0000.*model.json of eeeeeeeeeeee…"):
        write(models, models / "new")
    (models / "model.json").unlink()
    with pytest.raises(InputError, match=r"model.json: no such file; `dvc repro` makes it"):
        write(models, models / "new")
    assert not (models / "new").exists()
