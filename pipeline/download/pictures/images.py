"""Bytes -> a stored image: judged by its header first, then decoded no further than needed, resized and encoded.

Sizes are those of img2dataset's Resizer; colours come out as sRGB, upright and without metadata. Decision 9 has the
choice of codecs with its figures.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from pipeline.download.pictures import geometry, jpeg
from pipeline.download.pictures.colour import to_srgb, transform
from pipeline.download.pictures.exif import upright
from pipeline.download.pictures.formats import sniff
from pipeline.download.pictures.geometry import Pixels, Plan
from pipeline.download.pictures.phash import SIDE, perceptual_hash
from pipeline.download.pictures.raster import Raster
from pipeline.download.web.policy import Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason

Source = jpeg.Jpeg | Raster

_KINDS = {"jpg": "jpeg", "png": "png", "webp": "webp"}
_MOST_SIDE = {"jpg": 65_500, "png": 1 << 20, "webp": 16_383}
"""What the encoders write at most, pixels."""

_LARGE = 16_000_000
_ONE_LARGE = threading.Lock()
"""Pictures of more decoded pixels than _LARGE are decoded one at a time in a process, which bounds its memory."""


@dataclass(frozen=True)
class Stored:
    """An encoded image with what is known of it; sizes in pixels, ``original`` ones upright, too."""

    image: bytes
    format: str
    original_format: str
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str
    phash: int


class ImageStage:
    """Encoded bytes -> :class:`Stored`. Several threads may call it at once.

    Raises:
        Refused: whatever the bytes are, nothing else.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config
        self._formats = frozenset(config.formats)
        cv2.setNumThreads(1)  # workers are one per core
        warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF, many pixels: judged here
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, config.max_pixels)

    def __call__(self, body: bytes) -> Stored:
        try:
            return self._store(body)
        except Refused:
            raise
        except Image.DecompressionBombError as exc:
            raise Refused(Reason.TOO_MANY_PIXELS, str(exc)[:300]) from exc
        except Exception as exc:  # damaged files make parsers raise almost anything, MemoryError included
            raise Refused(Reason.DECODE, f"{type(exc).__name__}: {exc}"[:300]) from exc

    def _store(self, body: bytes) -> Stored:
        kind = sniff(body, self._formats)
        source = self._open(body, kind)
        width, height = source.width, source.height
        if source.orientation >= 5:
            width, height = height, width
        self._check(width, height)
        source.check(self.config.max_pixels)
        plan = geometry.plan(width, height, self.config)
        self._check_plan(plan)
        image = self._kept(source, kind) if plan.final == (width, height) else None
        if image is not None:
            phash = self._hash_of_kept(source)
        else:
            image, phash = self._made(source, plan)
        return Stored(
            image=image,
            format=self.config.format,
            original_format=kind,
            width=plan.final[0],
            height=plan.final[1],
            original_width=width,
            original_height=height,
            sha256=hashlib.sha256(body).hexdigest(),
            phash=phash,
        )

    def _open(self, body: bytes, kind: str) -> Source:
        if kind == "jpeg":
            return jpeg.Jpeg(body)
        return Raster(body, kind, self.config.max_frames, self.config.max_pixels)

    def _check(self, width: int, height: int) -> None:
        limit, shorter, longer = self.config, min(width, height), max(width, height)
        if shorter < 1:
            raise Refused(Reason.DECODE, f"{width} x {height} pixels")
        if width * height > limit.max_pixels:
            raise Refused(Reason.TOO_MANY_PIXELS, f"{width} x {height}, {limit.max_pixels} pixels allowed")
        if shorter < limit.min_image_size:
            raise Refused(Reason.TOO_SMALL, f"{width} x {height}, {limit.min_image_size} wanted")
        if longer / shorter > limit.max_aspect_ratio:
            raise Refused(Reason.ASPECT_RATIO, f"{width} x {height}, ratio {limit.max_aspect_ratio} allowed")

    def _check_plan(self, plan: Plan) -> None:
        """A thin line, resized to a shorter side of 256, can become a bomb of our own making."""
        for width, height in (plan.scaled, plan.final):
            if width * height > self.config.max_pixels or max(width, height) > _MOST_SIDE[self.config.format]:
                raise Refused(Reason.TOO_MANY_PIXELS, f"it would be stored as {width} x {height} pixels")

    def _kept(self, source: Source, kind: str) -> bytes | None:
        """The bytes as they came, without metadata, where they are already what would be stored."""
        if not self.config.keep_original or kind != _KINDS[self.config.format]:
            return None
        if source.icc and transform(source.icc, 3) is not None:
            return None
        return source.stripped()

    def _hash_of_kept(self, source: Source) -> int:
        """The hash of a picture that is kept as it came. It is decoded to its end for this, so damage is found."""
        size = (source.width, source.height)
        if isinstance(source, jpeg.Jpeg):
            with self._room(source.decoded_pixels((1, 1))):
                return perceptual_hash(*source.grey(SIDE))
        with self._room(source.decoded_pixels(size)):
            return perceptual_hash(_grey(source.pixels(size)))

    def _made(self, source: Source, plan: Plan) -> tuple[bytes, int]:
        scaled = plan.scaled[::-1] if source.orientation >= 5 else plan.scaled
        with self._room(source.decoded_pixels(scaled)):
            small = geometry.scale(source.pixels(scaled), scaled, source.extent(scaled))
        turned = upright(small, source.orientation) if source.orientation != 1 else small
        rgb = to_srgb(geometry.crop(turned, plan.final), source.icc)
        return self._encode(geometry.pad(rgb, plan.final)), perceptual_hash(_grey(rgb))

    def _room(self, pixels: int) -> AbstractContextManager[object]:
        return _ONE_LARGE if pixels > _LARGE else nullcontext()

    def _encode(self, rgb: Pixels) -> bytes:
        if self.config.format == "jpg":
            return jpeg.encode(rgb, self.config.quality)
        flag = cv2.IMWRITE_PNG_COMPRESSION if self.config.format == "png" else cv2.IMWRITE_WEBP_QUALITY
        bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        done, encoded = cv2.imencode(f".{self.config.format}", bgr, [flag, self.config.quality])
        if not done:
            raise Refused(Reason.DECODE, f"it cannot be encoded as {self.config.format}")
        return encoded.tobytes()


def _grey(pixels: Pixels) -> Pixels:
    if pixels.shape[2] == 1:
        return pixels[:, :, 0]
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
