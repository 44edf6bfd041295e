"""Published statistics: read as they are published, refused in one line when they cannot be."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from darkroom.errors import InputError
from darkroom.evaluation.published import read_statistics

MU = np.array([0.5, 1.0, 0.25])
SIGMA = np.array([[2.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 3.0]])


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(path: Path) -> str:
    """The message without the path in front."""
    with pytest.raises(InputError) as error:
        read_statistics(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mean_and_covariance_come_back(tmp_path, save):
    path = tmp_path / "cifar10.npz"
    save(path, mu=MU, sigma=SIGMA)
    found = read_statistics(path)
    assert torch.equal(found.mean, torch.from_numpy(MU))
    assert torch.equal(found.covariance, torch.from_numpy(SIGMA))
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_arrays_are_not_even_read(tmp_path):
    """ADM's files hold images and spatial statistics as well; one of pickled objects is there to be left alone."""
    extra = {"mu_s": np.zeros(5), "sigma_s": np.zeros((5, 5)), "arr_0": np.array([print], dtype=object)}
    found = read_statistics(write(tmp_path / "adm.npz", mu=MU, sigma=SIGMA, **extra))
    assert torch.equal(found.mean, torch.from_numpy(MU))


def test_float32_and_other_layouts_become_float64(tmp_path):
    path = write(tmp_path / "s.npz", mu=MU.astype(">f4"), sigma=np.asfortranarray(SIGMA.astype(np.float32)))
    found = read_statistics(path)
    assert found.covariance.dtype == torch.float64
    assert torch.allclose(found.covariance, torch.from_numpy(SIGMA), rtol=1e-6)
    assert torch.allclose(found.mean, torch.from_numpy(MU))


def test_rounding_of_a_covariance_is_no_asymmetry(tmp_path):
    rounded = SIGMA.copy()
    rounded[0, 1] += 1e-8
    found = read_statistics(write(tmp_path / "s.npz", mu=MU, sigma=rounded)).covariance
    assert torch.equal(found, found.T)


def changed(array: np.ndarray, where: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds no array 'mu', only nothing"),
        ({"mu": MU}, "holds no array 'sigma', only mu"),
        ({"mean": MU, "sigma": SIGMA}, "holds no array 'mu', only mean, sigma"),
        ({"mu": MU[:2], "sigma": SIGMA}, "mu has shape (2,) and sigma (3, 3); expected (F,) and (F, F)"),
        ({"mu": MU, "sigma": SIGMA[:2]}, "mu has shape (3,) and sigma (2, 3); expected (F,) and (F, F)"),
        ({"mu": MU[None], "sigma": SIGMA}, "mu has shape (1, 3); expected mu (F,) and sigma (F, F)"),
        ({"mu": MU, "sigma": SIGMA.diagonal()}, "sigma has shape (3,); expected mu (F,) and sigma (F, F)"),
        ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, "mu has shape (0,); expected mu (F,) and sigma (F, F)"),
        ({"mu": MU, "sigma": np.triu(SIGMA)}, "sigma is not symmetric; it is no covariance"),
        ({"mu": MU, "sigma": changed(SIGMA, (1, 1), -1)}, "sigma has a negative variance; it is no covariance"),
        ({"mu": changed(MU, (1,), np.nan), "sigma": SIGMA}, "mu is not finite everywhere"),
        ({"mu": MU, "sigma": changed(SIGMA, (2, 2), np.inf)}, "sigma is not finite everywhere"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "mu is int64, expected floating point"),
        ({"mu": MU, "sigma": SIGMA.astype(complex)}, "sigma is complex128, expected floating point"),
        ({"mu": MU.astype(str), "sigma": SIGMA}, "mu is <U32, expected floating point"),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(tmp_path, arrays, message):
    assert refusal(write(tmp_path / "s.npz", **arrays)) == message


class Writes:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


def test_objects_are_refused_and_not_run(tmp_path):
    path = write(tmp_path / "s.npz", mu=np.array([Writes(tmp_path / "written")], dtype=object), sigma=SIGMA)
    assert refusal(path).startswith("is no npz of plain arrays: ")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"mu": Writes(tmp_path / "written")}))
    assert refusal(tmp_path / "pickle.npz").startswith("is no npz of plain arrays: ")
    assert not (tmp_path / "written").exists()


def test_a_header_that_promises_too_much_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + bytes(24))
    assert refusal(tmp_path / "s.npz").startswith("is no npz of plain arrays: ")


def test_damaged_files_are_refused(tmp_path):
    path = write(tmp_path / "s.npz", mu=MU, sigma=SIGMA)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(MU.tobytes()) + 3] ^= 255
    for content in (b"", b"<html>", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        assert refusal(path).startswith("is no npz of plain arrays: ")


def test_a_missing_file_a_directory_and_a_single_array_are_refused(tmp_path):
    assert refusal(tmp_path / "absent.npz") == "cannot be read: No such file or directory"
    assert refusal(tmp_path) == "cannot be read: Is a directory"
    np.save(tmp_path / "mu.npy", MU)
    assert refusal(tmp_path / "mu.npy") == "holds one array; expected an npz with mu and sigma"
