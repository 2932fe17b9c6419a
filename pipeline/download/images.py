"""Bytes -> a stored image: judged by its header first, then decoded, resized and encoded by img2dataset."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.download.policy import Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# Only decoders inside Pillow and OpenCV: never Ghostscript or another outside program. (MPO opens as JPEG.)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


@dataclass(frozen=True)
class Stored:
    """An encoded image with what is known of it."""

    image: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str
    phash: int


@cache
def _resizer_class() -> Any:
    """img2dataset's Resizer, by its file: the package imports all of itself, torch included (9 CPU s a worker)."""
    package = importlib.util.find_spec("img2dataset")
    if package is None or not package.submodule_search_locations:
        raise ImportError("img2dataset is not installed")
    file = Path(package.submodule_search_locations[0], "resizer.py")
    spec = importlib.util.spec_from_file_location("clipmill_img2dataset_resizer", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Resizer


class ImageStage:
    """Encoded bytes -> :class:`Stored`. Raises Refused with the reason for what cannot be stored."""

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config
        self._resize = _resizer_class()(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=not config.upscale,
            encode_quality=config.quality,
            encode_format=config.format,
            min_image_size=config.min_image_size,
            max_aspect_ratio=config.max_aspect_ratio,
        )

    def __call__(self, body: bytes) -> Stored:
        self._check_header(body)
        image, width, height, original_width, original_height, error = self._resize(io.BytesIO(body))
        if error is not None or image is None:
            raise Refused(_resize_reason(str(error)), str(error))
        digest = hashlib.sha256(body).hexdigest()
        return Stored(bytes(image), width, height, original_width, original_height, digest, perceptual_hash(image))

    def _check_header(self, body: bytes) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of large images: ours is the stricter limit
                with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                    width, height = image.size
        except Image.DecompressionBombError as exc:
            raise Refused(Reason.TOO_MANY_PIXELS, str(exc)) from exc
        except UnidentifiedImageError as exc:
            raise Refused(Reason.NOT_AN_IMAGE, "no known image format") from exc
        except Exception as exc:  # a damaged header makes Pillow's parsers raise almost anything
            raise Refused(Reason.DECODE, f"{type(exc).__name__}: {exc}"[:300]) from exc
        if width * height > self.config.max_pixels:
            raise Refused(Reason.TOO_MANY_PIXELS, f"{width} x {height}, {self.config.max_pixels} pixels allowed")


def perceptual_hash(image: bytes) -> int:
    """Difference hash: is each of 8 x 8 grey pixels brighter than its left neighbour? As a signed int64."""
    with Image.open(io.BytesIO(image)) as opened:
        grey = np.asarray(opened.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)  # [8, 9]
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])  # [8]
    return int(bits.view(">i8")[0])


def _resize_reason(error: str) -> Reason:
    if "too small" in error:
        return Reason.TOO_SMALL
    if "aspect ratio" in error:
        return Reason.ASPECT_RATIO
    return Reason.DECODE
