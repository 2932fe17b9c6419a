"""JPEG: its header read without a decoder, decoding at the scale that is needed, and its bytes without metadata."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.download.pictures.exif import orientation
from pipeline.download.web.policy import Refused
from schemas.errors import Reason

_SOF = {0xC0, 0xC1, 0xC2}
_OTHER_SOF = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PROGRESSIVE = 0xC2
_DHT, _EOI, _SOS, _DQT, _DRI, _APP0, _APP1, _APP2, _APP14 = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE
_BARE = {0x01, *range(0xD0, 0xD8)}
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""A marker within compressed data, where FF 00 is a byte, FF D0-D7 is a restart and FF FF is filling."""

MAX_SEGMENTS = 4096
MAX_SCANS = 100
"""An encoder writes about ten. Each costs a pass over the whole picture, from a few bytes: the progressive bomb."""

_JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_WHOLE_BAND = b"\0\x3f\0"
"""The end of a scan's header, unless progressive: coefficients 0 to 63, all bits."""

_COLOURS = {1: "GRAY", 3: "RGB", 4: "CMYK"}


class Jpeg:
    """One JPEG, its header read. ``width`` and ``height`` are as stored, before ``orientation``.

    Raises:
        Refused: decode for a damaged header, format_refused for kinds that browsers do not show either.
    """

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.width = self.height = self.components = 0
        self.orientation = 1
        self._progressive, self._exif = False, False
        icc: dict[int, bytes] = {}
        for marker, start, end in _segments(body):
            if marker in _SOF:
                self._read_frame(marker, body[start:end])
            elif marker in _OTHER_SOF:
                raise Refused(Reason.FORMAT_REFUSED, "a lossless, hierarchical or arithmetic-coded JPEG is not let in")
            elif marker == _APP1 and not self._exif and body.startswith(b"Exif\0\0", start):
                self._exif, self.orientation = True, orientation(body[start:end])
            elif marker == _APP2 and body.startswith(b"ICC_PROFILE\0", start) and end - start > 14:
                icc[body[start + 12]] = body[start + 14 : end]
            elif marker == _SOS:
                self._scans = self._count_scans(body[start:end], end)
                if not self._progressive and body[end - 3 : end] != _WHOLE_BAND:
                    # Some phones write something else, which decoders pass over with a warning. Ours takes none.
                    self.body = body[: end - 3] + _WHOLE_BAND + body[end:]
                break
        else:
            raise Refused(Reason.DECODE, "a JPEG without picture data")
        self.icc = b"".join(icc[i] for i in sorted(icc)) or None

    def _read_frame(self, marker: int, frame: bytes) -> None:
        if len(frame) < 6 or self.components:
            raise Refused(Reason.DECODE, "a JPEG with a damaged frame header")
        precision, self.height, self.width, self.components = struct.unpack_from(">BHHB", frame)
        self._progressive = marker == _PROGRESSIVE
        if precision != 8:
            raise Refused(Reason.FORMAT_REFUSED, f"a JPEG of {precision} bits is not let in")
        if self.components not in _COLOURS:
            raise Refused(Reason.DECODE, f"a JPEG of {self.components} components")

    def _count_scans(self, first: bytes, end: int) -> int:
        """At least the scans there are. One with all components is the only one of a JPEG that is not progressive."""
        if not self.components:
            raise Refused(Reason.DECODE, "a JPEG whose picture data comes before its frame header")
        if not self._progressive and first[:1] == bytes([self.components]):
            return 1
        return 1 + self.body.count(b"\xff\xda", end)

    def check(self, max_pixels: int) -> None:
        """Raises Refused where decoding would take more passes over the picture than an honest encoder asks for."""
        if self._scans > MAX_SCANS or self._scans * self.width * self.height > 16 * max_pixels:
            raise Refused(Reason.DECODE, f"{self._scans} scans of {self.width} x {self.height} pixels")

    def decoded_pixels(self, size: tuple[int, int]) -> int:
        """Pixels held while :meth:`pixels` works."""
        divisor = 1 if self._scans > 1 else self._divisor(size)  # several scans meet in whole coefficients
        return self.width * self.height // divisor**2

    def extent(self, size: tuple[int, int]) -> tuple[float, float]:
        """The width and height that the picture fills of :meth:`pixels`, whose last ones may be filled in part."""
        divisor = self._divisor(size)
        return self.width / divisor, self.height / divisor

    def pixels(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """[H, W, C] of at least ``size`` (width, height), RGB, grey or CMYK: 1/1, 1/2, 1/4 or 1/8 of the whole.

        Scaling is part of the inverse DCT; the other eighths that the codec offers have no fast code, and are slower.

        Raises:
            Refused: truncated or damaged data, anywhere in the picture.
        """
        decoded = self._decode(self._divisor(size), _COLOURS[self.components])
        # Adobe's CMYK, which is all there is, holds the paper's white as 255.
        return 255 - decoded if self.components == 4 else decoded

    def grey(self, least: int) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """Grey levels [H, W], neither side below ``least`` unless the picture's own is, and their extent.

        All of the compressed data is read, so damage is found as above.
        """
        divisor = next((d for d in (8, 4, 2) if min(self.width, self.height) >= d * least), 1)
        return self._decode(divisor, "GRAY")[:, :, 0], (self.width / divisor, self.height / divisor)

    def _divisor(self, size: tuple[int, int]) -> int:
        return next((d for d in (8, 4, 2) if -(-self.width // d) >= size[0] and -(-self.height // d) >= size[1]), 1)

    def _decode(self, divisor: int, colours: str) -> NDArray[np.uint8]:
        width, height = -(-self.width // divisor), -(-self.height // divisor)
        try:  # strict: what libjpeg fills with grey after a mere warning is an error
            decoded = simplejpeg.decode_jpeg(self.body, colours, min_height=height, min_width=width)
        except ValueError as exc:
            raise Refused(Reason.DECODE, str(exc)[:300]) from exc
        if decoded.shape[:2] != (height, width):
            raise Refused(Reason.DECODE, f"{decoded.shape[1]} x {decoded.shape[0]} pixels, {width} x {height} expected")
        return np.asarray(decoded, np.uint8)

    def stripped(self) -> bytes | None:
        """The same pixels without metadata, ending at the end of the image; None where they are no plain RGB.

        What stays: tables, frame, scans, and of the segments APPn those that tell the colours (JFIF, Adobe).

        Raises:
            Refused: the data has no end marker.
        """
        if self.components != 3 or self.orientation != 1:
            return None
        body, parts, jfif, adobe = self.body, [b"\xff\xd8"], b"", b""
        for marker, start, end in _segments(body):
            segment = body[start - 4 : end]
            if marker == _APP0 and body.startswith(b"JFIF\0", start):
                jfif = _JFIF
            elif marker == _APP14 and body.startswith(b"Adobe", start) and end - start >= 12:
                adobe = b"\xff\xee\x00\x0e" + body[start : start + 12]
            elif marker in _SOF or marker in (_DHT, _DQT, _DRI):
                parts.append(segment)
            elif marker == _SOS:
                parts += [segment, body[end : _scan_end(body, end)]]
            elif marker == _EOI:
                parts.append(b"\xff\xd9")
                break
        parts[1:1] = [jfif, adobe]
        kept = b"".join(parts)
        # More than the raw pixels: no picture needs it, so something else is hidden in there.
        return kept if len(kept) <= 3 * self.width * self.height + 4096 else None


def encode(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """RGB [H, W, 3] -> JPEG, 4:2:0 as OpenCV's."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), max(1, quality), "RGB", "420"))


def _segments(body: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of every segment's content; compressed data in between is passed over."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        while body[at : at + 2] == b"\xff\xff":
            at += 1
        if body[at : at + 1] != b"\xff" or at + 2 > len(body):
            raise Refused(Reason.DECODE, f"no JPEG marker at byte {at}")
        marker = body[at + 1]
        if marker == _EOI:
            yield marker, at + 2, at + 2
            return
        if marker in _BARE:
            at += 2
            continue
        length = int.from_bytes(body[at + 2 : at + 4], "big")
        end = at + 2 + length
        if length < 2 or end > len(body):
            raise Refused(Reason.DECODE, f"a JPEG segment ends outside the file at byte {at}")
        yield marker, at + 4, end
        at = _scan_end(body, end) if marker == _SOS else end
    raise Refused(Reason.DECODE, f"more than {MAX_SEGMENTS} segments")


def _scan_end(body: bytes, start: int) -> int:
    found = _MARKER.search(body, start)
    if found is None:
        raise Refused(Reason.DECODE, "the picture data has no end")
    return found.start()
