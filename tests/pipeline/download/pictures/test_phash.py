"""The perceptual hash against scipy's DCT, and against what it must survive."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.fft
from PIL import Image

from pipeline.download.pictures.images import ImageStage
from pipeline.download.pictures.phash import NOISE, perceptual_hash
from schemas.configs import DownloadConfig
from tests.pipeline.download.pictures.pictures import encode, photo


def distance(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


def grey(seed: int, width: int = 256, height: int = 192) -> np.ndarray:
    return cv2.cvtColor(photo(width, height, seed), cv2.COLOR_RGB2GRAY)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_phash_of_the_books(seed: int) -> None:
    """Shrink to 32 x 32, DCT, the lowest 8 x 8 against their median, row by row: by scipy and without a shortcut."""
    picture = grey(seed)  # 256 x 192: means of 8 x 6 pixels
    small = picture.reshape(32, 6, 32, 8).mean(axis=(1, 3))
    low = scipy.fft.dctn(small, norm="ortho")[:8, :8]
    bits = (low > np.median(low)) & (np.abs(low) >= NOISE)
    number = int("".join("1" if bit else "0" for bit in bits.ravel()), 2)
    assert perceptual_hash(picture) == number - 2**64 * (number >= 2**63)


def test_a_width_that_32_does_not_divide() -> None:
    picture = grey(3, 131, 77)
    fine = np.repeat(np.repeat(picture, 32, axis=0), 32, axis=1)  # now it does: means of 77 x 131
    small = fine.reshape(32, 77, 32, 131).mean(axis=(1, 3))
    low = scipy.fft.dctn(small, norm="ortho")[:8, :8]
    bits = (low > np.median(low)) & (np.abs(low) >= NOISE)
    assert f"{perceptual_hash(picture) & (2**64 - 1):064b}" == "".join("1" if bit else "0" for bit in bits.ravel())


def test_it_survives_compression_size_and_format() -> None:
    """Photos, each in five other forms: 3 bits of 64 at most, as a rule."""
    stage, distances = ImageStage(DownloadConfig()), []
    for seed in range(16):
        picture = Image.fromarray(photo(400, 300, seed))
        original = stage(encode(picture, "BMP")).phash
        half = picture.resize((250, 187), Image.Resampling.BICUBIC)
        others = [
            encode(picture, "JPEG", quality=40),
            encode(half, "JPEG", quality=80),
            encode(half, "PNG", compress_level=1),
            encode(picture.resize((800, 600), Image.Resampling.LANCZOS), "JPEG", quality=75),
            encode(picture, "WEBP", quality=60, method=0),
        ]
        distances += [distance(original, stage(other).phash) for other in others]
    assert np.mean(np.array(distances) <= 3) > 0.97
    assert max(distances) <= 6


def test_different_pictures_are_far_apart() -> None:
    hashes = [perceptual_hash(grey(seed)) for seed in range(60)]
    apart = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 10
    assert 28 < np.mean(apart) < 34


def test_flat_pictures_have_few_bits() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((240, 320), 130, np.uint8)
    noisy = np.clip(flat + rng.normal(0, 3, flat.shape), 0, 255).astype(np.uint8)
    ramp = np.tile(np.linspace(0, 255, 320).astype(np.uint8), (240, 1))
    for picture in (flat, noisy, ramp, np.zeros((5, 5), np.uint8)):
        assert distance(perceptual_hash(picture), 0) < 8


def test_large_and_tiny_pictures() -> None:
    picture = grey(4, 3000, 1000)
    small = cv2.resize(picture, (300, 100), interpolation=cv2.INTER_AREA)
    assert distance(perceptual_hash(picture), perceptual_hash(small)) <= 3
    assert -(2**63) <= perceptual_hash(np.full((1, 1), 200, np.uint8)) < 2**63
