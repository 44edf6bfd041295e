"""Two gloo ranks, started once, do all of it and write down what they saw; and what one process does alone."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from darkroom.errors import InputError
from darkroom.training.distributed import Ranks, _checksum, accumulating, joined, rank_device, wrap
from tests.ranks import finish, project, start

# A batch of 8 in parts of 4, each in micro-batches of 2.
NETWORK = """
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))

def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
"""
SEEN = """
seen = {"rank": [ranks.rank, ranks.count, ranks.local_rank, ranks.is_first]}
part = ranks.part(8)
seen["part"] = [part.start, part.stop]
seen["agree"] = [ranks.agree(wish[ranks.rank]) for wish in ((0, 3), (2, 1), (-5, -7))]
total = torch.full((2,), 1.5 + ranks.rank)
seen["sum"] = ranks.sum(total).tolist() + total.tolist()
share = ranks.share(5)
gathered = ranks.gather(torch.arange(5, dtype=torch.uint8)[share, None], 5)
seen["gather"] = None if gathered is None else gathered.tolist()

def check(tensors):
    try:
        ranks.check_equal(tensors, "the EMA weights")
    except StageFailed as error:
        return str(error)

mine = {"b": torch.zeros(3), "a": torch.arange(4), "c": torch.tensor(True)}
seen["equal"] = check(mine)
mine["b"][2] = -0.0 if ranks.rank else 0.0
seen["one bit"] = check(mine)
seen["names"] = check({"a": torch.ones(1)} if ranks.rank else {"z": torch.ones(1)})

namespace = {"torch": torch}
exec(json.loads(os.environ["NETWORK"]), namespace)
inner = namespace["network"]()
if ranks.rank:
    torch.nn.init.zeros_(inner[0].weight)  # rank 0's parameters count
module = wrap(inner, torch.device("cpu"), ranks)
inputs, targets = (values[part] for values in namespace["batch"]())
for first in (0, 2):
    chosen = slice(first, first + 2)
    with accumulating(module, last=first == 2):
        loss = torch.nn.functional.mse_loss(module(inputs[chosen]), targets[chosen]) / 2
        loss.backward()
    if first == 0:
        seen["own"] = inner[0].bias.grad.tolist()
seen["gradient"] = [parameter.grad.tolist() for parameter in inner.parameters()]
pathlib.Path(f"{ranks.rank}.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("ranks"), SEEN)
    code, _, err = finish(start(root, NETWORK=json.dumps(NETWORK)))
    assert (code, err) == (0, "")
    return [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_know_themselves_and_their_part(seen):
    assert [values["rank"] for values in seen] == [[0, 2, 0, True], [1, 2, 1, False]]
    assert [values["part"] for values in seen] == [[0, 4], [4, 8]]


def test_ranks_agree_on_the_largest_wish_of_each_call(seen):
    assert [values["agree"] for values in seen] == [[3, 2, -5]] * 2


def test_a_sum_is_over_all_ranks_and_in_place(seen):
    assert [values["sum"] for values in seen] == [[4.0] * 4] * 2


def test_shares_of_different_length_are_gathered_in_order(seen):
    assert [values["gather"] for values in seen] == [[[0], [1], [2], [3], [4]], None]


def test_ranks_that_differ_are_named_on_every_rank(seen):
    assert [values["equal"] for values in seen] == [None, None]
    differ = "the EMA weights differ on rank 1 of 2 (first in {}); they have to be equal"
    assert [values["one bit"] for values in seen] == [differ.format("b")] * 2
    assert [values["names"] for values in seen] == [differ.format("names and shapes")] * 2


def test_the_accumulated_gradient_is_that_of_the_whole_batch_in_one_process(seen):
    namespace = {"torch": torch}
    exec(NETWORK, namespace)
    network = namespace["network"]()
    inputs, targets = namespace["batch"]()
    mse_loss(network(inputs), targets).backward()
    for rank in seen:
        for parameter, found in zip(network.parameters(), rank["gradient"], strict=True):
            difference = torch.tensor(found) - parameter.grad
            assert difference.norm() <= 1e-6 * parameter.grad.norm()


def test_no_gradient_is_exchanged_before_the_last_micro_batch(seen):
    assert seen[0]["own"] != seen[1]["own"]


@pytest.mark.parametrize(("count", "size"), [(3, 8), (16, 8)])
def test_a_batch_that_ranks_cannot_share_equally_is_bad_input(count, size):
    with pytest.raises(InputError, match=rf"train\.batch_size = {size}: expected a multiple of {count}"):
        Ranks(0, count).part(size)


@pytest.mark.parametrize(("count", "size"), [(1, 7), (3, 7), (8, 3), (4, 8)])
def test_shares_cover_everything_once_and_are_about_equal(count, size):
    shares = [Ranks(rank, count).share(size) for rank in range(count)]
    assert [i for share in shares for i in range(size)[share]] == list(range(size))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_is_all_there_is_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined(torch.device("cpu")) as ranks:
        assert ranks == Ranks()
        assert not torch.distributed.is_initialized()
    tensor, network = torch.ones(3), nn.Linear(2, 2)
    assert ranks.part(7) == slice(0, 7)
    assert ranks.agree(-4) == -4
    assert ranks.sum(tensor) is tensor
    assert ranks.gather(tensor, 3) is tensor
    ranks.check_equal({"a": tensor}, "weights")
    ranks.wait()
    assert wrap(network, torch.device("cpu"), ranks) is network
    with accumulating(network, last=False):
        network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_checksum_knows_each_value_and_its_place(dtype):
    tensor = torch.arange(12).remainder(2).to(dtype)
    sums = {int(_checksum(tensor))}
    for index in range(len(tensor)):
        changed = tensor.clone()
        changed[index] = 1 - changed[index].to(torch.int64)
        sums.add(int(_checksum(changed)))
    assert len(sums) == 13
    assert int(_checksum(tensor.flip(0))) not in sums
    assert int(_checksum(tensor.reshape(3, 4).T.contiguous().T)) == int(_checksum(tensor))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x': expected the whole number that torchrun sets"),
        ({"RANK": "0"}, "WORLD_SIZE = '': expected"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "torchrun's environment is not whole: .*MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_bad_input(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), joined(torch.device("cpu")):
        pass


def test_each_rank_has_the_gpu_of_its_number_or_says_that_it_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert rank_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="rank 2 of this machine has no GPU: expected DARKROOM_NPROC of at most 2"):
        rank_device(torch.device("cuda"))
    monkeypatch.delenv("RANK")
    assert rank_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
