"""Pictures for the tests of images: photo-like ones, and one whose every pixel is known."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def photo(width: int, height: int, seed: int, grain: float = 4.0) -> Pixels:
    """Smooth noise on several scales, discs and boxes with edges, and grain: [H, W, 3]."""
    rng = np.random.default_rng(seed)
    canvas = np.full((height, width, 3), 110, np.float32)
    for cells, strength in ((4, 70), (16, 35), (64, 18)):
        coarse = rng.standard_normal((cells, cells, 3), dtype=np.float32)
        canvas += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(20):
        colour, size = rng.uniform(0, 255, 3).tolist(), int(rng.integers(2, max(4, width // 8)))
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        if rng.random() < 0.5:
            cv2.circle(canvas, (x, y), size, colour, -1, cv2.LINE_AA)
        else:
            cv2.rectangle(canvas, (x, y), (x + size, y + size // 2), colour, -1)
    canvas = cv2.GaussianBlur(canvas, (0, 0), 0.7)
    canvas += grain * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def blocks() -> Pixels:
    """Six blocks of 16 x 16 pixels, all of different colours, so that every turn shows: [32, 48, 3]."""
    colours = np.array([[[200, 40, 40], [40, 180, 60], [50, 60, 210]], [[230, 220, 40], [30, 30, 30], [240, 240, 240]]])
    return np.kron(colours, np.ones((16, 16, 1))).astype(np.uint8)


def encode(pixels: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    """``pixels`` as Pillow writes them."""
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)
    return out.getvalue()


def decode(data: bytes) -> Pixels:
    """As every reader of the table opens a stored image: [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal to noise, dB."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@cache
def resizer_class() -> Any:
    """img2dataset's Resizer, by its file: the package imports all of itself, torch included."""
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations
    spec = importlib.util.spec_from_file_location("resizer", Path(package.submodule_search_locations[0], "resizer.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Resizer
