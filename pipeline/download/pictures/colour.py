"""Colours to sRGB: ICC profiles, CMYK, grey."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Pixels = NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_MAX_PROFILE = 4 << 20
_SAME = 3
"""A profile which moves no colour by more than so many levels of 255 is sRGB, whatever its name."""


def to_srgb(pixels: Pixels, icc: bytes | None) -> Pixels:
    """[H, W, C], C = 1 (grey), 3 (RGB) or 4 (CMYK) -> sRGB [H, W, 3]. A broken or unfit profile is ignored."""
    channels = pixels.shape[2]
    convert = transform(icc, channels) if icc else None
    if convert is None and channels == 3:
        return pixels
    if convert is None and channels == 1:
        return np.repeat(pixels, 3, axis=2)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, _MODES[channels])
    if convert is None:
        return np.asarray(image.convert("RGB"))
    return np.asarray(ImageCms.applyTransform(image, convert))


@lru_cache(maxsize=16)
def transform(icc: bytes, channels: int) -> ImageCms.ImageCmsTransform | None:
    """What turns colours of ``icc`` into sRGB; None where nothing does, or nothing needs to."""
    if len(icc) > _MAX_PROFILE:
        return None
    mode = _MODES[channels]
    try:
        built = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        colours = _samples(mode)
        plain, converted = np.asarray(colours.convert("RGB"), np.int16), ImageCms.applyTransform(colours, built)
    except Exception:  # PyCMSError, and whatever else a broken profile makes the parser raise
        return None
    if mode != "CMYK" and np.abs(plain - np.asarray(converted, np.int16)).max() <= _SAME:
        return None
    return built


def _samples(mode: str) -> Image.Image:
    """Colours all over the space, in one row."""
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    grid = np.stack(np.meshgrid(*[levels] * len(mode), indexing="ij"), axis=-1).reshape(1, -1, len(mode))
    return Image.fromarray(grid, mode)
