import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from darkroom.errors import InputError, StageFailed
from darkroom.files import digest_file, read_json
from darkroom.training import snapshots
from darkroom.training.ema import PowerEMA
from darkroom.training.snapshots import collect, missing_snapshots, read_index, snapshot_steps, write_snapshot
from tests.unit.training.small import FINGERPRINT
from tests.unit.training.trajectory import make_network, walk

STEPS = [5, 10]


def trained(directory, first=1, ema=None, network=None):
    """A training of 10 steps with snapshots at 5 and 10."""
    network = network or make_network()
    ema = ema or PowerEMA(network)

    def after(step):
        if step in STEPS:
            write_snapshot(directory, step, ema, FINGERPRINT)

    walk(network, ema, 10, first=first, after=after)
    return ema


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted((directory / "snapshots").iterdir())}


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [
        (100, 4, [25, 50, 75, 100]),
        (10, 3, [3, 6, 10]),
        (800_000, 2, [400_000, 800_000]),
        (3, 8, [1, 2, 3]),
        (7, 1, [7]),
        (7, 0, []),
    ],
)
def test_snapshots_are_evenly_spaced_and_end_with_the_last_step(total, count, steps):
    assert snapshot_steps(total, count) == steps


def test_a_snapshot_holds_the_averages_and_says_what_it_is(tmp_path):
    ema = trained(tmp_path)
    names = [f"step-{step:09d}-width-{width}.safetensors" for step in STEPS for width in ("0.050", "0.100")]
    assert list(contents(tmp_path)) == ["snapshots.json", *names]
    for width, name in zip(ema.widths, names[2:], strict=True):
        tensors = load_file(tmp_path / "snapshots" / name)
        for key, tensor in ema.networks[width].state_dict().items():
            assert torch.equal(tensors[key], tensor), key
        with safe_open(tmp_path / "snapshots" / name, framework="pt") as file:
            about = json.loads(file.metadata()["snapshot"])
        assert about == {
            "buffers": ["1.num_batches_tracked", "1.running_mean", "1.running_var"],
            "fingerprint": FINGERPRINT,
            "step": 10,
            "width": width,
        }
    index = read_json(tmp_path / "snapshots" / "snapshots.json")
    assert index["fingerprint"] == FINGERPRINT
    assert [line["file"] for line in index["snapshots"]] == names
    assert [line["sha256"] for line in index["snapshots"]] == [
        digest_file(tmp_path / "snapshots" / name) for name in names
    ]


def test_a_resumed_training_writes_the_same_files(tmp_path):
    trained(tmp_path / "a")
    network, first = make_network(), PowerEMA(make_network())
    walk(network, first, 3)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trained(tmp_path / "b", first=4, ema=first, network=network)  # killed after its last snapshot, saved at step 3
    before = contents(tmp_path / "b")
    network.load_state_dict(weights)
    resumed = PowerEMA(network)
    resumed.load(kept)
    trained(tmp_path / "b", first=4, ema=resumed, network=network)
    assert contents(tmp_path / "b") == before == contents(tmp_path / "a")


def test_what_a_kill_left_half_written_is_removed_by_the_next_snapshot(tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / ".step-000000005-width-0.050.safetensors.abc.tmp").write_bytes(b"half")
    trained(tmp_path)
    assert not list((tmp_path / "snapshots").glob(".*"))


def test_a_full_disk_leaves_the_snapshots_before_and_says_so(tmp_path, monkeypatch):
    ema = trained(tmp_path)
    before = contents(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "save_file", full)
    with pytest.raises(StageFailed, match=r"snapshot of step 12 cannot be written to .*: \[Errno 28\] No space left"):
        write_snapshot(tmp_path, 12, ema, FINGERPRINT)
    assert contents(tmp_path) == before


def test_snapshots_of_another_training_are_not_listed(tmp_path):
    ema = trained(tmp_path)
    write_snapshot(tmp_path, 5, ema, "e" * 64)
    index = read_index(tmp_path / "snapshots")
    assert index.fingerprint == "e" * 64
    assert [(snapshot.step, snapshot.width) for snapshot in index.snapshots] == [(5, 0.05), (5, 0.1)]


def test_collect_copies_what_was_asked_for_and_nothing_else(tmp_path):
    ema = trained(tmp_path)
    write_snapshot(tmp_path, 8, ema, FINGERPRINT)
    target = tmp_path / "models" / "snapshots"
    collect(tmp_path, target, STEPS, [0.1, 0.05])
    kept, source = {path.name: path.read_bytes() for path in target.iterdir()}, contents(tmp_path)
    assert kept.keys() == {name for name in source if "step-000000008" not in name}
    assert all(source[name] == content for name, content in kept.items() if name != "snapshots.json")
    assert [snapshot.step for snapshot in read_index(target).snapshots] == [5, 5, 10, 10]
    collect(tmp_path, target, [10], [0.1])
    assert len(list(target.iterdir())) == 2


def test_collect_refuses_damaged_snapshots_and_leaves_the_target(tmp_path):
    trained(tmp_path)
    target = tmp_path / "models" / "snapshots"
    collect(tmp_path, target, STEPS, [0.05, 0.1])
    before = {path.name for path in target.iterdir()}
    damaged = tmp_path / "snapshots" / "step-000000005-width-0.100.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(StageFailed, match=r"step-000000005-width-0.100.safetensors: is damaged.* train again"):
        collect(tmp_path, target, STEPS, [0.05, 0.1])
    assert {path.name for path in target.iterdir()} == before


def test_missing_snapshots_are_named(tmp_path):
    assert len(missing_snapshots(tmp_path, STEPS, [0.05, 0.1])) == 4
    trained(tmp_path)
    assert missing_snapshots(tmp_path, STEPS, [0.05, 0.1]) == []
    (tmp_path / "snapshots" / "step-000000005-width-0.100.safetensors").unlink()
    missing = ["step-000000005-width-0.100.safetensors", "step-000000007-width-0.100.safetensors"]
    assert missing_snapshots(tmp_path, [5, 7, 10], [0.1]) == missing
    with pytest.raises(StageFailed, match=f"holds no {', '.join(missing)}"):
        collect(tmp_path, tmp_path / "target", [5, 7, 10], [0.1])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "fingerprint"),
        ('{"fingerprint": "f", "snapshots": [{"step": 5, "width": 0.05, "sha256": "a", "file": "../x"}]}', "'../x'"),
    ],
)
def test_an_index_that_is_not_one_is_refused(tmp_path, content, words):
    (tmp_path / "snapshots.json").write_text(content)
    with pytest.raises(InputError, match="is not a list of snapshots") as refused:
        read_index(tmp_path)
    assert words in str(refused.value)
