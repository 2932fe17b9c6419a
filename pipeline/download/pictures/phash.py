"""The perceptual hash: 64 bits that stay when a picture is scaled, compressed again or saved in another format.

The well-known pHash: the picture as 32 x 32 grey pixels, their DCT, its 8 x 8 lowest frequencies, each against their
median. Shrinking and DCT are both linear, so one matrix per side does the two at once.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 32
_LOW = 8
_MOST = 1024
"""A longer side is shrunk first: it bounds the matrices that are kept."""

NOISE = 2.0
"""A coefficient (of the orthonormal DCT; grey levels 0 to 255) below this is compression noise or flatness. It sets no
bit, so that a flat picture has few bits, and is known by that."""


def perceptual_hash(grey: NDArray[np.uint8], extent: tuple[float, float] | None = None) -> int:
    """Grey levels [H, W] -> 64 bits as a signed int64, the lowest frequency in the highest bit.

    ``extent``: the width and height that the picture fills, where it ends within the last pixels.
    """
    height, width = grey.shape
    if max(height, width) > _MOST:
        height, width = min(height, _MOST), min(width, _MOST)
        grey, extent = np.asarray(cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA), np.uint8), None
    fills = extent or (width, height)
    low = _basis(height, fills[1]) @ grey.astype(np.float32) @ _basis(width, fills[0]).T  # [8, 8]
    return _bits(low.ravel().tolist())


def _bits(low: list[float]) -> int:
    """64 coefficients, the lowest first, as bits. Plain Python: for so few, NumPy's calls take twice as long."""
    order = sorted(low)
    median = (order[31] + order[32]) / 2
    bits = 0
    for coefficient in low:
        bits = bits << 1 | (coefficient > median and abs(coefficient) >= NOISE)
    return bits - (bits >> 63 << 64)


@lru_cache(maxsize=512)
def _basis(n: int, fills: float) -> NDArray[np.float32]:
    """[8, n]: the mean over each of 32 equal stretches of n pixels, then the first 8 rows of the DCT-II of 32."""
    edges = np.arange(SIDE + 1) * fills / SIDE  # [33]
    pixel = np.arange(n)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)  # [32, n]
    mean = np.clip(overlap, 0, None) * SIDE / fills
    k, i = np.arange(_LOW)[:, None], np.arange(SIDE)
    dct = np.sqrt(2 / SIDE) * np.cos(np.pi * k * (2 * i + 1) / (2 * SIDE))  # [8, 32]
    dct[0] /= np.sqrt(2)
    return np.asarray(dct @ mean, np.float32)
