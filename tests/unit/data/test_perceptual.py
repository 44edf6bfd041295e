"""The perceptual hash: what it is, and what it tells apart."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from darkroom.data.images import fit
from darkroom.data.perceptual import perceptual_hashes

CROPS = [
    Image.fromarray(photo).crop((x, y, x + 128, y + 128))
    for photo in load_sample_images().images
    for x in (0, 170, 340, 500)
    for y in (0, 150, 290)
]


def hashes(images: list[Image.Image], size: int = 64) -> np.ndarray:
    return perceptual_hashes(np.stack([fit(image, size) for image in images]))


def saved(image: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return Image.open(buffer)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32, 61])
def test_bits_are_signs_of_the_lowest_dct_coefficients_against_their_median(channels: int, size: int) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (20, channels, size, size), dtype=np.uint8)
    weights = [1] if channels == 1 else [0.299, 0.587, 0.114]
    for image, found in zip(pixels, perceptual_hashes(pixels), strict=True):
        luma = np.tensordot(weights, image.astype(np.float64), axes=(0, 0))
        # scipy's DCT-II without orthonormalisation is twice the sum; only the order of coefficients matters here.
        low = dctn(luma, type=2)[:8, :8].reshape(-1)
        expected = low > np.median(low[1:])
        expected[0] = False
        bits = np.array([int(found) >> bit & 1 for bit in range(64)], dtype=bool)
        assert (bits != expected).sum() <= 1  # rounding of the cosines can move one that is at the median


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda image: saved(image, format="JPEG", quality=85), 3),
        (lambda image: saved(image, format="WEBP", quality=85), 3),
        (lambda image: image.resize((100, 100), Image.Resampling.BICUBIC), 3),
        (lambda image: ImageEnhance.Brightness(image).enhance(0.9), 3),
    ],
)
def test_an_image_that_was_saved_scaled_or_brightened_anew_stays_near(change: object, most: int) -> None:
    distances = np.bitwise_count(hashes(CROPS) ^ hashes([change(image) for image in CROPS]))  # type: ignore[operator]
    assert np.median(distances) <= 1
    assert (distances <= most).mean() >= 0.8


def test_different_images_are_far_apart() -> None:
    found = hashes(CROPS)
    distances = np.bitwise_count(found[:, None] ^ found[None])[np.triu_indices(len(CROPS), 1)]
    assert distances.min() > 8


def test_small_and_constant_images_have_a_hash() -> None:
    assert perceptual_hashes(np.full((2, 1, 4, 4), 7, dtype=np.uint8)).tolist() == [0, 0]
    assert perceptual_hashes(np.empty((0, 3, 16, 16), dtype=np.uint8)).shape == (0,)
