"""Training on a GPU: the same bits each time, images that stay uint8 on the device, and ranks that stay equal."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from darkroom.training import checkpoints
from darkroom.training.setup import set_up
from tests.unit.training.small import FINGERPRINT, INFO, PARAMS, _data, small_training

RANK = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from darkroom.device import choose_device
from darkroom.training.distributed import joined, rank_device
from tests.unit.training.small import EVERY_STEP, small_training

device, start = choose_device(), dist.init_process_group
if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):  # NCCL does not let ranks share a GPU; gloo does
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group = lambda backend, **options: start("gloo", **options)
with joined(rank_device(device)) as ranks:
    small_training(Path(sys.argv[1]), device=rank_device(device), ranks=ranks, saving=EVERY_STEP)
"""


def states(directory):
    return checkpoints.load_newest(directory, FINGERPRINT).tensors


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_training_on_a_gpu_repeats_bit_for_bit(tmp_path, gpu, precision):
    for name in ("a", "b"):
        small_training(tmp_path / name, device=gpu, precision=precision, dropout=0.2)
    first, again = states(tmp_path / "a"), states(tmp_path / "b")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.gpu
def test_images_lie_on_the_gpu_as_uint8_and_batches_are_those_of_the_cpu(gpu, oracle):
    there, here = (set_up(PARAMS, INFO, _data(), device)[1] for device in (gpu, torch.device("cpu")))
    assert there.images.device.type == gpu.type
    assert there.images(0, 8)[0].dtype == torch.uint8
    for first in (0, 8, 72):
        ours, expected = there(first, 8), here(first, 8)
        assert torch.equal(ours.t.cpu(), expected.t)
        assert torch.equal(ours.labels.cpu(), expected.labels)
        difference = (ours.x_t.cpu() - expected.x_t).abs().max()
        oracle("a batch made on a GPU", "made on the CPU", difference, 1e-5)


@pytest.mark.gpu
def test_two_ranks_on_a_gpu_stay_equal_and_train_what_one_process_trains(tmp_path, gpu, oracle):
    """Each save compares the ranks' states bit for bit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path / "two"],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[3],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    small_training(tmp_path / "one", device=gpu)
    two, one = states(tmp_path / "two"), states(tmp_path / "one")
    for name, tensor in one.items():
        if name.startswith(("raw.", "ema.")):
            difference = float((two[name] - tensor).norm() / tensor.norm())
            oracle("weights after 12 steps on two ranks of a GPU", "one process, relative", difference, 1e-4)
