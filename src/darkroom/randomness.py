"""Random numbers as a pure function of (seed, purpose, index, step): nothing to store, nothing to restore.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written with int64
tensor operations so that every device gives the same bits. Because sample i's numbers depend on i alone, a batch may be
split, resumed or spread over ranks without any sample noticing.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What the numbers are for: a stream each. The values are part of every result, so they stay."""

    DATA_ORDER = 1
    FLIP = 2
    TIMESTEP = 3
    TRAINING_NOISE = 4
    LABEL_DROP = 5
    INITIAL_NOISE = 6
    STEP_NOISE = 7
    DATA_SPLIT = 8
    REFERENCE_ORDER = 9
    SCALE_NOISE = 10
    REFERENCE_SHIFT = 11
    DROPOUT = 12


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32x32-bit product wraps in int64, but its bits are right; the mask undoes the sign extension of the shift.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, purpose: Purpose, index: Tensor, count: int, step: int = 0) -> Tensor:
    """Uniform 32-bit words, int64 of shape (len(index), count), on the device of `index`.

    `seed` is any integer below 2**64, `index` a 1-d int64 tensor of global sample indices >= 0 and `step` < 2**16 tells
    repeated draws for one sample apart (a sampler's step, an epoch goes into `seed` or `index`).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected a seed in [0, 2**64), got {seed}")
    if not 0 <= step < 1 << 16:
        raise ValueError(f"expected a step in [0, 65536), got {step}")
    index = index.to(torch.int64)
    blocks = -(-count // 4)
    block = torch.arange(blocks, dtype=torch.int64, device=index.device).expand(len(index), blocks)
    low = (index & _MASK)[:, None].expand_as(block)
    high = ((index >> 32) & _MASK)[:, None].expand_as(block)
    stream = torch.full_like(block, (int(purpose) << 16) | step)
    words = _philox((block, low, high, stream), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, purpose: Purpose, index: Tensor, shape: tuple[int, ...] = (), step: int = 0) -> Tensor:
    """Float64 in the open interval (0, 1), of shape (len(index), *shape)."""
    words = random_words(seed, purpose, index, math.prod(shape), step)
    return ((words.double() + 0.5) / 2**32).reshape(len(index), *shape)


def normal(seed: int, purpose: Purpose, index: Tensor, shape: tuple[int, ...] = (), step: int = 0) -> Tensor:
    """Standard normal float32 of shape (len(index), *shape), by the Box-Muller transform in float64."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    u = uniform(seed, purpose, index, (pairs, 2), step)
    radius, angle = torch.sqrt(-2 * torch.log(u[..., 0])), 2 * math.pi * u[..., 1]
    values = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return values.flatten(1)[:, :count].float().reshape(len(index), *shape)


def integers(seed: int, purpose: Purpose, index: Tensor, high: int, step: int = 0) -> Tensor:
    """Int64 in [0, high), of shape (len(index),). `high` is at most 2**31; the bias is below high / 2**32."""
    return (random_words(seed, purpose, index, 1, step)[:, 0] * high) >> 32


def permutation(seed: int, purpose: Purpose, epoch: int, n: int) -> Tensor:
    """A permutation of range(n), int64 on the CPU, that depends on (seed, purpose, epoch, n) alone."""
    index = torch.arange(n, dtype=torch.int64) + (epoch << 32)
    words = random_words(seed, purpose, index, 2)
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)
