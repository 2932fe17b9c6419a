"""Photo-like JPEGs drawn from a seed: smooth noise of all scales, edges and texture, as large as photographs are.

At quality 85, 4:2:0, about 175 KB at 1024 x 768 and 20 KB at 256 x 256.
"""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]


def photo(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """An RGB picture [H, W, 3]."""
    rng = np.random.default_rng(seed)
    image = _octaves(rng, width, height)  # [H, W, 3]
    for _ in range(6):  # things with sharp outlines, each with shading of its own
        mask = np.zeros((height, width), np.float32)
        points = rng.uniform((0, 0), (width, height), (int(rng.integers(3, 8)), 2)).astype(np.int32)
        cv2.fillPoly(mask, [cv2.convexHull(points)], 1.0, cv2.LINE_AA)
        inside = image[::-1] * rng.uniform(0.5, 1.2) + rng.normal(0, 0.25, 3).astype(np.float32)
        image += mask[..., None] * (inside - image)
    cover = _noise(rng, width, height, 3)[..., :1] > 0  # texture covers about half, as grass or cloth does
    image += np.where(cover, 0.12, 0.018) * rng.standard_normal((height, width, 1), dtype=np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 0.6)  # the lens
    pixels: NDArray[np.uint8] = np.clip(image * 255, 0, 255).astype(np.uint8)
    return pixels


def _octaves(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Noise whose amplitude is halved as its scale is, as in natural pictures; colours mostly move together."""
    image = np.full((height, width, 3), rng.uniform(0.3, 0.6, 3), np.float32)
    amplitude, cells = 0.18, 2
    while cells < min(width, height) // 2:
        layer = _noise(rng, width, height, cells)
        image += amplitude * (0.8 * layer[..., :1] + 0.3 * layer)
        amplitude, cells = amplitude * 0.6, cells * 2
    return image


def _noise(rng: np.random.Generator, width: int, height: int, cells: int) -> Pixels:
    grid = rng.standard_normal((cells * height // width + 2, cells + 2, 3)).astype(np.float32)
    smooth: Pixels = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return smooth


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Encoded at quality 85, 4:2:0."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85, subsampling="4:2:0")
    return out.getvalue()


def draw(folder: Path, count: int, width: int, height: int) -> Path:
    """``count`` pictures as ``folder/WxH/N.jpg``; those that are there already are kept. Returns that folder."""
    here = folder / f"{width}x{height}"
    here.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = here / f"{number}.jpg"
        if not file.exists():
            file.write_bytes(jpeg(photo(number, width, height)))
    return here
