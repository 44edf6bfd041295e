"""A perceptual hash: 64 bits that change little when an image is saved, scaled or brightened anew."""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

_SIDE = 8  # frequencies in each direction
_SCALE = 4096
_LUMA = (299, 587, 114)  # ITU-R 601, in thousandths


def perceptual_hashes(pixels: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """uint64 (N,) for images uint8 (N, C, H, W), square, of at least 4 pixels and 1 or 3 channels.

    Bit 8 u + v says whether the coefficient (u, v) of the luma's DCT-II, of the 8x8 lowest frequencies, is above their
    median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", 3.2.1, without scaling to
    32x32 first). The cosines are rounded to whole 4096ths, so every sum is exact in float64 and each machine gives the
    same bits. Images below 8x8 have as many frequencies as pixels, and fewer bits.
    """
    basis = _basis(pixels.shape[-1])
    coefficients = (basis @ _luma(pixels).astype(np.float64) @ basis.T).reshape(len(pixels), len(basis) ** 2)
    above = coefficients > np.median(coefficients[:, 1:], axis=1, keepdims=True)  # the mean brightness says little
    above[:, 0] = False
    weights = np.uint64(1) << _positions(len(basis)).astype(np.uint64)
    hashes: NDArray[np.uint64] = (above * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W), 1000 times the luma of colours: whole numbers, which float32 holds exactly."""
    if pixels.shape[1] == 1:
        return pixels[:, 0].astype(np.float32)
    planes = pixels.reshape(*pixels.shape[:2], pixels.shape[2] * pixels.shape[3]).astype(np.float32)
    return (np.array([_LUMA], dtype=np.float32) @ planes).reshape(len(pixels), *pixels.shape[2:])


@cache
def _basis(size: int) -> NDArray[np.float64]:
    """(min(8, size), size): cosines of the lowest frequencies, in whole 4096ths."""
    rows = range(min(_SIDE, size))
    cosines = [[math.cos(math.pi * (2 * x + 1) * u / (2 * size)) for x in range(size)] for u in rows]
    return np.round(np.array(cosines) * _SCALE)


def _positions(side: int) -> NDArray[np.intp]:
    return (np.arange(side)[:, None] * _SIDE + np.arange(side)).reshape(-1)
