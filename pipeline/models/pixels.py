"""Encoded image file -> the square of pixels that a CLIP encoder looks at. Without torch: workers start fast."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.cards import EncoderCard

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]


class Undecodable(OSError, ValueError):
    """An image file that does not decode: truncated, damaged, of no known format, or too thin to scale."""


class Decoder:
    """Image file -> uint8 [3, S, S], what open_clip's preprocessing makes of it before it goes over to floats.

    The pixels are those of ``open_clip.transform.image_transform`` on the opened file, byte for byte. One exception: a
    JPEG at least four times as large as S is scaled down by a power of two within the inverse DCT, to no less than
    2 S on either side, before the same filter does the rest.

    Made from the card alone, and picklable.
    """

    def __init__(self, card: EncoderCard) -> None:
        self.size = card.image_size
        self.resize_mode = card.resize_mode
        self._least = (2 * self.size, 2 * self.size)
        self._filter = Image.Resampling.BILINEAR if card.interpolation == "bilinear" else Image.Resampling.BICUBIC

    def __call__(self, data: bytes) -> Pixels:
        """Raises Undecodable, whatever is wrong with the file."""
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = image.size
                drafted = image.draft(image.mode, self._least)  # JPEG only, and only by powers of two
                return _planes(self._square(image, size, drafted[1] if drafted else None).convert("RGB"))
        except MemoryError:
            raise
        except Exception as exc:  # Pillow's plugins raise nearly everything: SyntaxError, TypeError, struct.error, ...
            raise Undecodable(f"{type(exc).__name__}: {exc}"[:300]) from exc

    def _square(self, image: Image.Image, size: tuple[int, int], extent: Box | None) -> Image.Image:
        """Scaled, then cropped or padded to S x S, in the file's own colours as open_clip does.

        Args:
            size: width and height of the file's picture.
            extent: of that picture in ``image``, where it was scaled already: its last pixels may be half empty.
        """
        s, (width, height) = self.size, size
        if self.resize_mode == "squash":
            return self._scaled(image, (s, s), extent)
        if self.resize_mode == "longest":
            ratio = max(width, height) / s
            return _padded(self._scaled(image, (round(width / ratio), round(height / ratio)), extent), s)
        longer = int(s * max(width, height) / min(width, height))
        image = self._scaled(image, (s, longer) if width <= height else (longer, s), extent)
        left, top = round((image.width - s) / 2), round((image.height - s) / 2)
        return image.crop((left, top, left + s, top + s))

    def _scaled(self, image: Image.Image, size: tuple[int, int], extent: Box | None) -> Image.Image:
        return image if image.size == size else image.resize(size, self._filter, extent)


def _padded(image: Image.Image, size: int) -> Image.Image:
    """In the middle of a square of zeros, whatever zero means to the image's mode: open_clip's padding."""
    if image.size == (size, size):
        return image
    square = Image.new(image.mode, (size, size), 0)
    if (palette := image.getpalette()) is not None:
        square.putpalette(palette)
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def _planes(image: Image.Image) -> Pixels:
    """RGB image -> [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
