"""Processes that work on one training or drawing together: who they are, and what they say to each other.

torchrun starts them and names them in the environment. Tensors on a GPU go through NCCL; everything on the CPU, control
included, goes through gloo, so that agreeing on something never waits for a GPU.
"""

import hashlib
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from darkroom.errors import InputError, Interrupted, StageFailed

# Where a dead process cannot be noticed (a machine that vanished, a GPU that hangs), the others give up after this.
TIMEOUT = timedelta(minutes=10)
LONG_TIMEOUT = timedelta(hours=12)  # while the first rank fetches a mirror's checkpoint, say

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class RankLost(StageFailed):
    """Another rank ended or cannot be reached. Why it did is that rank's to say."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together. Alone, nothing here costs anything.

    All methods but `part` and `share` are collective: every rank has to call them, in the same order.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those on this machine: the number of its GPU
    patient: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and logs."""
        return self.rank == 0

    def part(self, size: int, what: str = "train.batch_size") -> slice:
        """This rank's contiguous part of range(size), equal for all. Raises InputError, naming `what`, if none is."""
        if size % self.count:
            raise InputError(f"{what} = {size}: expected a multiple of {self.count}, the number of ranks")
        return self.share(size)

    def share(self, size: int) -> slice:
        """This rank's contiguous share of range(size); shares differ by one at most."""
        return self._shares(size)[self.rank]

    def _shares(self, size: int) -> list[slice]:
        return [slice(rank * size // self.count, (rank + 1) * size // self.count) for rank in range(self.count)]

    def agree(self, wish: int, *, patient: bool = False) -> int:
        """The largest wish of any rank in this call. Waits for the other ranks, not for a GPU.

        With `patient`, for hours: one of them may be doing something long for all.
        """
        if self.count == 1:
            return wish
        wishes = torch.tensor([wish])
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.patient if patient else None)
        return int(wishes)

    def wait(self, *, patient: bool = False) -> None:
        """Return when all ranks have come here."""
        self.agree(0, patient=patient)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, now holding its sum over all ranks; on a GPU nothing waits for it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values of rank 0, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)

    def gather(self, share: Tensor, size: int) -> Tensor | None:
        """All ranks' shares of `size` rows, (size, ...), on rank 0; None on the others. On the CPU.

        `share` holds the rows `self.share(size)`.
        """
        if self.count == 1:
            return share
        shares = self._shares(size)
        longest = max(part.stop - part.start for part in shares)
        sent = share.new_zeros((longest, *share.shape[1:]))  # gloo gathers equal shapes only
        sent[: len(share)] = share
        if not self.is_first:
            dist.gather(sent)
            return None
        received = [torch.empty_like(sent) for _ in shares]
        dist.gather(sent, received)
        return torch.cat([rows[: part.stop - part.start] for rows, part in zip(received, shares, strict=True)])

    def check_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raise StageFailed, naming ranks and a tensor, unless all ranks hold the same bits under the same names.

        What is compared are 64-bit checksums, computed where the tensors are.
        """
        if self.count == 1:
            return
        names = sorted(tensors)
        shapes = [(name, str(tensors[name].dtype), tuple(tensors[name].shape)) for name in names]
        described = hashlib.sha256(repr(shapes).encode()).digest()
        self._compare(torch.frombuffer(bytearray(described), dtype=torch.int64), ["names and shapes"] * 4, what)
        if names:
            sums = [_checksum(tensors[name]) for name in names]
            self._compare(torch.stack([value.to(sums[0].device) for value in sums]).cpu(), names, what)

    def _compare(self, numbers: Tensor, names: list[str], what: str) -> None:
        gathered = [torch.empty_like(numbers) for _ in range(self.count)]
        dist.all_gather(gathered, numbers)
        rows = [tuple(row.tolist()) for row in gathered]
        usual = Counter(rows).most_common(1)[0][0]  # of equally common ones, that of the lowest rank
        others = [rank for rank, row in enumerate(rows) if row != usual]
        if others:
            name = next(n for n, a, b in zip(names, usual, rows[others[0]], strict=True) if a != b)
            who = ", ".join(map(str, others))
            raise StageFailed(f"{what} differ on rank {who} of {self.count} (first in {name}); they have to be equal")


def _checksum(tensor: Tensor) -> Tensor:
    """int64 (), a function of bits and order: any one changed element changes it."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()]).long()
    bits = bits * -7046029254386353131  # 2^64 / golden ratio, odd: integers wrap around, so this loses nothing
    bits ^= bits >> 32
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def rank_device(device: torch.device) -> torch.device:
    """The device of this rank: each has the GPU of its local number. Raises InputError if that is not there."""
    if device.type != "cuda" or "RANK" not in os.environ:
        return device
    local_rank, gpus = _number("LOCAL_RANK", "0"), torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(f"rank {local_rank} of this machine has no GPU: expected DARKROOM_NPROC of at most {gpus}")
    return torch.device("cuda", local_rank)


@contextmanager
def joined(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the ranks that torchrun started with this one; alone, if it started none.

    `device` is this rank's, from `rank_device`; `timeout` is how long one rank waits for another. A rank that is
    Interrupted waits for the others, so that none is ended while another one saves. Raises RankLost in the place of
    what a dead rank makes torch raise, and InputError if torchrun's environment is not whole.
    """
    if "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.count == 1:
        yield ranks
        return
    try:
        with _killable():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            ranks = replace(ranks, patient=dist.new_group(backend="gloo", timeout=LONG_TIMEOUT))
            ranks.wait()  # gloo connects here, and not later in the middle of something
            ranks.wait(patient=True)
        try:
            yield ranks
        except Interrupted:
            ranks.wait(patient=True)  # for the first one, which saves and copies to the mirror
            dist.destroy_process_group()
            raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            said = str(error).splitlines()[0]
            raise RankLost(f"rank {ranks.rank} of {ranks.count} lost another one: {said}") from None
        raise
    except ValueError as error:
        if "environment variable" in str(error):  # MASTER_ADDR, MASTER_PORT
            raise InputError(f"torchrun's environment is not whole: {error}") from None
        raise
    # Not after other errors: with a rank missing, leaving in good order may never end.
    dist.destroy_process_group()


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name} = {text!r}: expected the whole number that torchrun sets")
    return int(text)


@contextmanager
def _killable() -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once: waiting for ranks that never come, Python would not notice them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wrap(network: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """What to call in training: `network`, or a DistributedDataParallel around it that averages gradients over ranks.

    Parameters become those of rank 0. Buffers are not exchanged: they are constants here. The graph is not declared
    static: that saves nothing where every parameter is used, and does not go together with `no_sync`.
    """
    if ranks.count == 1:
        return network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a newer name for broadcast_buffers, which torch 2.11 lacks
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def accumulating(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a micro-batch: gradients are exchanged after the last one of a batch only."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
