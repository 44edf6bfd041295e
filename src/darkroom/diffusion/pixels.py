"""Between the pixels of files and the numbers of the network."""

import torch
from torch import Tensor


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8 by rounding: the exact inverse of `to_unit_range` on all 256 levels."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
