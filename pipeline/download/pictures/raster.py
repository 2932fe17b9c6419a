"""Every format but JPEG, through Pillow: first frame, full depth, transparency over white."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image

from pipeline.download.pictures import chunks
from pipeline.download.pictures.exif import orientation
from pipeline.download.web.policy import Refused
from schemas.errors import Reason

Pixels = NDArray[np.uint8]

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # workers are one per core already
_WHITE = (255, 255, 255)
_STRIP = 4_000_000
"""Pixels that are flattened at once."""

_GREY = ("1", "L", "LA", "La")
_MAX_PROFILE = 4 << 20


class Raster:
    """One picture, its header read. ``width`` and ``height`` are as stored, before ``orientation``.

    Raises:
        Refused: too_many_frames, too_many_pixels; decode for what is damaged.
    """

    def __init__(self, body: bytes, kind: str, max_frames: int, max_pixels: int) -> None:
        self.kind, self._png = kind, None
        if kind == "png":
            self._png = chunks.read_png(body)
            body, frames = self._png.pixels_only(), self._png.frames
        elif kind == "webp":
            frames = chunks.check_webp(body, max_pixels)
        elif kind == "gif":
            frames = chunks.count_gif_frames(body, max_frames)
        elif kind == "tiff":
            frames = chunks.count_tiff_pages(body, max_frames)
        else:
            frames = 1
        self.body = body
        self._image: Any = Image.open(io.BytesIO(body), formats=[kind.upper()])
        self.width, self.height = self._image.size
        if kind in ("webp", "avif"):
            frames = max(frames, getattr(self._image, "n_frames", 1))
        if frames > max_frames:
            raise Refused(Reason.TOO_MANY_FRAMES, f"more than {max_frames} frames")
        self._read_metadata()

    def _read_metadata(self) -> None:
        if self._png is not None:
            self.orientation, self.icc = orientation(self._png.exif), _inflate(self._png.icc)
            return
        self.icc = self._image.info.get("icc_profile") or None
        # A TIFF is turned by Pillow; its size is given as it will be then.
        self.orientation = 1 if self.kind == "tiff" else orientation(self._image.info.get("exif") or b"")

    def check(self, max_pixels: int) -> None:
        """Nothing but pixels costs time here."""

    def decoded_pixels(self, size: tuple[int, int]) -> int:
        """Pixels held while :meth:`pixels` works: all, whatever ``size`` is asked for."""
        return self.width * self.height

    def extent(self, size: tuple[int, int]) -> None:
        """It fills all of :meth:`pixels`."""

    def pixels(self, size: tuple[int, int]) -> Pixels:
        """[H, W, C] of the first frame: RGB, grey or CMYK.

        Raises:
            Refused: samples of 32 bits, whose white we do not know.
            OSError and others: damaged data, as Pillow names it.
        """
        self._image.load()
        if self._image.size != (self.width, self.height):
            raise Refused(Reason.DECODE, f"{self._image.size} pixels, {(self.width, self.height)} expected")
        last = self._image.crop((0, self.height - 1, self.width, self.height))
        if self._png is not None and not any(last.tobytes()) and self._png.short_of_pixels():
            raise Refused(Reason.DECODE, "the PNG has less than its pixels")  # a black last row may be none
        rows = max(1, _STRIP // self.width)
        if self.height <= rows:
            return _flat(self._image)
        return self._in_strips(rows)

    def _in_strips(self, rows: int) -> Pixels:
        """Flattened by so many rows: each of Pillow's steps on the way would take the whole picture's memory again."""
        flat = None
        for top in range(0, self.height, rows):
            strip = _flat(self._image.crop((0, top, self.width, min(top + rows, self.height))))
            if flat is None:
                flat = np.empty((self.height, self.width, strip.shape[2]), np.uint8)
            flat[top : top + rows] = strip
        assert flat is not None
        return flat

    def stripped(self) -> bytes | None:
        """The same pixels without metadata; None where they are no plain 8-bit RGB, or the format is not stored."""
        if self.orientation != 1:
            return None
        if self._png is not None:
            return self.body if self._png.plain_rgb else None
        return chunks.strip_webp(self.body) if self.kind == "webp" else None


def _flat(image: Image.Image) -> Pixels:
    """[H, W, C] of 8 bits, without transparency."""
    if image.mode in ("I", "F"):
        raise Refused(Reason.FORMAT_REFUSED, "samples of 32 bits are not let in")
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        return ((deep + 128) // 257).astype(np.uint8)[:, :, None]
    if image.mode == "CMYK":
        return np.asarray(image)
    if image.has_transparency_data:
        return _over_white(image)
    if image.mode in _GREY:
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _over_white(image: Image.Image) -> Pixels:
    whole = image.convert("RGBA")
    canvas = Image.new("RGB", whole.size, _WHITE)
    canvas.paste(whole, mask=whole.getchannel("A"))
    pixels = np.asarray(canvas)
    return pixels[:, :, :1] if image.mode in _GREY else pixels


def _inflate(packed: bytes) -> bytes | None:
    """A PNG's profile: its name, a zero, the method, and the zlib stream. None if broken or overlong."""
    _, _, rest = packed.partition(b"\0")
    try:
        inflater = zlib.decompressobj()
        icc = inflater.decompress(rest[1:], _MAX_PROFILE)
    except zlib.error:
        return None
    return icc if inflater.eof else None
