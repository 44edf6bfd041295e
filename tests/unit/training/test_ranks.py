"""Training on two gloo ranks, really started, against one process: batches, weights, and what a lost rank leaves."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from darkroom.stages.runner import DONE, FAILED, INTERRUPTED
from darkroom.training import checkpoints
from tests.ranks import finish, project, start, wait_for
from tests.unit.training.small import FINGERPRINT, small_training

STEPS = 50
TRAIN = """
import sys
sys.path.insert(0, os.environ["REPOSITORY"])
from pathlib import Path
from tests.unit.training.small import Saving, small_training
from darkroom.training.batches import BatchSource
seen, real = [], BatchSource.__call__

def record(self, first, size):
    batch = real(self, first, size)
    seen.append([first, size, batch.x_t.double().sum().item(), batch.t.tolist(), batch.labels.tolist()])
    return batch

BatchSource.__call__ = record

def on_tick(tick):
    stop_at = int(os.environ.get("STOP_AT", "0"))
    if tick.step == stop_at:
        Path(f"at-{ranks.rank}").write_text(str(os.getpid()))
        if os.environ["HOW"] == "kill" and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["HOW"] == "stop" and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

resumed = []
micro = int(os.environ["MICRO"]) if "MICRO" in os.environ else None
trained = small_training(Path("run"), steps=STEPS, ranks=ranks, micro_batch=micro, ema_snapshots=2, on_tick=on_tick,
                         on_resume=resumed.append, saving=Saving(every_seconds=1e9, every_steps=10, cost=1e9))
Path(f"seen-{ranks.rank}.json").write_text(json.dumps({"batches": seen, "resumed": resumed}))
""".replace("STEPS", str(STEPS))


def begin(root, **environment):
    from pathlib import Path

    return start(root, REPOSITORY=str(Path(__file__).parents[3]), **environment)


def state_of(root):
    return checkpoints.load_newest(root / "run", FINGERPRINT).tensors


def compare(found, expected, oracle, name):
    for key, tensor in expected.items():
        if key.startswith(("raw.", "ema.", "power.")):
            difference = float((found[key] - tensor).norm() / tensor.norm())
            oracle(f"weights after {STEPS} steps, {name}", "one process, relative", difference, 1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    small_training(directory / "run", steps=STEPS, ema_snapshots=2)
    return state_of(directory)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("ranks"), TRAIN)
    code, _, err = finish(begin(root))
    assert (code, err) == (DONE, "")
    return root


def test_two_ranks_train_what_one_process_trains(alone, together, oracle):
    compare(state_of(together), alone, oracle, "two ranks")


def test_the_ranks_batches_are_the_halves_of_the_whole_one(together):
    seen = [json.loads((together / f"seen-{rank}.json").read_text())["batches"] for rank in (0, 1)]
    # The first one is for nothing: it settles in which order gradients are summed.
    assert [(first, size) for first, size, *_ in seen[0][1:]] == [(8 * step, 4) for step in range(STEPS)]
    assert [(first, size) for first, size, *_ in seen[1][1:]] == [(8 * step + 4, 4) for step in range(STEPS)]


@pytest.mark.soak  # its gradients: test_distributed.py
def test_accumulation_on_ranks_trains_the_same(alone, tmp_path, oracle):
    root = project(tmp_path, TRAIN)
    assert finish(begin(root, MICRO="2"))[0] == DONE
    compare(state_of(root), alone, oracle, "two ranks, accumulating")
    seen = json.loads((root / "seen-1.json").read_text())["batches"]
    assert [(first, size) for first, size, *_ in seen[2:5]] == [(2, 2), (6, 2), (10, 2)]


@pytest.mark.soak  # twelve processes; one that is killed: tests/unit/stages/test_launch.py
def test_a_killed_rank_ends_the_others_and_the_same_command_carries_on_to_the_same_bits(alone, tmp_path, oracle):
    """With four ranks sums depend on their order, which DDP changes after the first step of a process."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, root = project(tmp_path / "whole", TRAIN), project(tmp_path / "killed", TRAIN)
    assert finish(begin(whole, DARKROOM_NPROC="4"))[0] == DONE
    compare(state_of(whole), alone, oracle, "four ranks")
    code, _, err = finish(begin(root, DARKROOM_NPROC="4", STOP_AT="25", HOW="kill"))
    assert code == FAILED
    assert re.search(r"rank 1 \(process \d+\) was killed by SIGKILL, so the others were ended", err)
    code, _, err = finish(begin(root, DARKROOM_NPROC="4"))
    assert (code, err) == (DONE, "")
    for rank in range(4):
        assert json.loads((root / f"seen-{rank}.json").read_text())["resumed"] == [20]
    for name, tensor in state_of(whole).items():
        assert torch.equal(state_of(root)[name], tensor), name


@pytest.mark.soak  # signals on ranks: tests/unit/stages/test_launch.py
def test_a_signal_to_one_rank_stops_both_after_the_same_step_with_their_state_saved(together, tmp_path):
    root = project(tmp_path, TRAIN)
    code, _, err = finish(begin(root, STOP_AT="25", HOW="stop"))
    assert code == INTERRUPTED
    assert "stopped at step 25 of 50, state saved" in err
    assert finish(begin(root))[0] == DONE
    assert json.loads((root / "seen-1.json").read_text())["resumed"] == [25]
    for name, tensor in state_of(together).items():
        assert torch.equal(state_of(root)[name], tensor), name


def test_another_number_of_ranks_carries_on(alone, tmp_path, oracle):
    root = project(tmp_path, TRAIN)
    process = begin(root, STOP_AT="25", HOW="stop")
    wait_for(root / "at-0")
    assert finish(process)[0] == INTERRUPTED
    steps = []
    small_training(root / "run", steps=STEPS, ema_snapshots=2, on_resume=steps.append)
    assert steps == [25]
    compare(state_of(root), alone, oracle, "two ranks, then one")


def test_a_batch_that_the_ranks_cannot_divide_is_one_line(tmp_path):
    root = project(tmp_path, TRAIN)
    code, _, err = finish(begin(root, DARKROOM_NPROC="3"))
    assert code == 2
    assert err == "stage: train.batch_size = 8: expected a multiple of 3, the number of ranks\n"


def test_snapshots_are_written_once_by_the_first_rank(together):
    names = sorted(path.name for path in (together / "run" / "snapshots").glob("*.safetensors"))
    assert [name[:14] for name in names] == ["step-000000025"] * 2 + ["step-000000050"] * 2
    assert load_file(together / "run" / "snapshots" / names[0])
