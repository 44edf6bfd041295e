"""Random numbers as a pure function of (seed, purpose, index, step): nothing to store, nothing to restore.

The generator is Philox-4x32-10, which gives the same bits on every device. Because sample i's numbers depend on i
alone, a batch may be split, resumed or spread over ranks without any sample noticing.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from darkroom.philox import MASK, philox


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
    REFERENCE_TURN = 13
    BOOTSTRAP = 14
    SUBSET = 15


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
    low = (index & MASK)[:, None].expand_as(block)
    high = ((index >> 32) & MASK)[:, None].expand_as(block)
    stream = torch.full_like(block, (int(purpose) << 16) | step)
    words = philox((block, low, high, stream), (seed & MASK, (seed >> 32) & MASK))
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
