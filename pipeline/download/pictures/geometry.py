"""img2dataset's resize modes: which size a picture gets, and how its pixels get there."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from schemas.configs import DownloadConfig

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """Sizes as (width, height): first scaled, then cropped or padded in the middle to ``final``."""

    scaled: tuple[int, int]
    final: tuple[int, int]


def plan(width: int, height: int, config: DownloadConfig) -> Plan:
    """The sizes that img2dataset's Resizer (1.47) gives a picture, to the pixel."""
    mode, side = config.resize_mode, config.image_size
    shortest = mode in ("keep_ratio", "center_crop")
    reference = min(width, height) if shortest else max(width, height)
    if mode == "no" or not (config.upscale or reference > side):
        return Plan((width, height), (width, height))
    scale = side / reference
    scaled = max(1, round(width * scale)), max(1, round(height * scale))
    return Plan(scaled, (side, side) if mode in ("center_crop", "border") else scaled)


def scale(pixels: Pixels, size: tuple[int, int], extent: tuple[float, float] | None = None) -> Pixels:
    """[H, W, C] -> [h, w, C]: the mean over each new pixel's area, or Lanczos where it grows, as the Resizer does.

    ``extent`` is of a picture that was decoded at a fraction of its size: the width and height that it fills, which
    may end within the last pixels. Such a one takes bilinear where it shrinks less than twice: next to the same
    (decision 9 has the figures), in a fifth of the time.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size and extent in (None, size):
        return pixels
    if max(size[0] / width, size[1] / height) > 1:
        scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)
    elif extent is None or width > 2 * size[0] or height > 2 * size[1]:
        scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    elif extent == (width, height):
        scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    else:
        scaled = _scale_part(pixels, size, extent)
    filled = np.asarray(scaled, np.uint8)
    return filled if filled.ndim == 3 else filled[:, :, None]  # cv2 drops a single channel


def _scale_part(pixels: Pixels, size: tuple[int, int], extent: tuple[float, float]) -> cv2.typing.MatLike:
    """Bilinear, from a part whose sides are no whole numbers: otherwise all would be moved by up to a pixel."""
    x, y = extent[0] / size[0], extent[1] / size[1]
    back = np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5]])  # a new pixel's centre -> where it was
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, back, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def crop(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle of what is larger than ``size``."""
    height, width = pixels.shape[:2]
    top, left = max(0, (height - size[1]) // 2), max(0, (width - size[0]) // 2)
    return np.ascontiguousarray(pixels[top : top + size[1], left : left + size[0]])


def pad(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """White around what is smaller than ``size``."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    canvas = np.full((size[1], size[0], pixels.shape[2]), 255, np.uint8)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
