"""Published reference statistics: the mean and covariance of real images' features that FIDs in papers are against."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from darkroom.errors import InputError
from darkroom.files import digest_file

_SYMMETRIC = 1e-6  # difference from the transpose, relative to the largest entry; sums in another order differ by less


@dataclass(frozen=True)
class PublishedStatistics:
    """What FID needs of a reference (Heusel et al. 2017, eq. 6)."""

    mean: Tensor  # float64 (F,)
    covariance: Tensor  # float64 (F, F), symmetric
    sha256: str  # of the file


def read_statistics(path: Path) -> PublishedStatistics:
    """Arrays `mu` (F,) and `sigma` (F, F) of an npz, as TTUR, EDM and ADM publish them; others in it are not read.

    Nothing is unpickled. Raises InputError for a file that cannot be read, lacks an array or holds what is no mean and
    covariance.
    """
    try:
        digest = digest_file(path)
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, NpzFile):
            raise InputError(f"{path}: holds one array; expected an npz with mu and sigma")
        with file:
            mean, covariance = _array(path, file, "mu", 1), _array(path, file, "sigma", 2)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, BadZipFile, zlib.error, RuntimeError, MemoryError) as error:
        raise InputError(f"{path}: is no npz of plain arrays: {' '.join(str(error).split())}") from None
    if covariance.shape != 2 * mean.shape:
        raise InputError(f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; expected (F,) and (F, F)")
    if np.abs(covariance - covariance.T).max() > _SYMMETRIC * np.abs(covariance).max():
        raise InputError(f"{path}: sigma is not symmetric; it is no covariance")
    if covariance.diagonal().min() < 0:
        raise InputError(f"{path}: sigma has a negative variance; it is no covariance")
    return PublishedStatistics(torch.from_numpy(mean), torch.from_numpy((covariance + covariance.T) / 2), digest)


def _array(path: Path, file: NpzFile, name: str, dimensions: int) -> NDArray[np.float64]:
    if name not in file.files:
        raise InputError(f"{path}: holds no array {name!r}, only {', '.join(file.files) or 'nothing'}")
    array = file[name]
    if array.ndim != dimensions or array.size == 0:
        raise InputError(f"{path}: {name} has shape {array.shape}; expected mu (F,) and sigma (F, F)")
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{path}: {name} is {array.dtype}, expected floating point")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} is not finite everywhere")
    return array.astype(np.float64)
