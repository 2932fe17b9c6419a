"""The chunks of PNG and WebP, the blocks of GIF, the directories of TIFF.

Counted, checked and partly left out before a decoder sees them: its time and memory are bounded so.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.download.web.policy import Refused
from schemas.errors import Reason

MAX_CHUNKS = 20_000
MAX_TIFF_TAGS = 1000
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass, and its steps."""


@dataclass
class Png:
    """A PNG taken apart: chunks that hold pixels, and what the others tell of them."""

    parts: list[bytes] = field(default_factory=list)
    kinds: set[bytes] = field(default_factory=set)
    header: bytes = b""
    icc: bytes = b""
    exif: bytes = b""
    frames: int = 1

    def pixels_only(self) -> bytes:
        """A PNG of the chunks that hold pixels: texts, times, profiles and further frames are left out."""
        return _SIGNATURE + b"".join(self.parts)

    @property
    def plain_rgb(self) -> bool:
        """8 bits, RGB, neither transparent nor animated."""
        return self.header[8:10] == b"\x08\x02" and self.frames == 1 and b"tRNS" not in self.kinds

    def short_of_pixels(self) -> bool:
        """Does the compressed data end before the last row? (Decoders leave what is missing black, and say nothing.)"""
        inflater, missing = zlib.decompressobj(), self._raw_bytes()
        for part in self.parts:
            if part[4:8] == b"IDAT":
                missing -= len(inflater.decompress(part[8:-4], max(missing, 1)))
                while missing > 0 and inflater.unconsumed_tail:
                    missing -= len(inflater.decompress(inflater.unconsumed_tail, missing))
        return missing > 0

    def _raw_bytes(self) -> int:
        """Bytes of all rows, each with its filter's number; interlaced ones in the seven passes of Adam7."""
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", self.header)
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        total = 0
        for x0, y0, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
            columns, rows = max(0, -(-(width - x0) // dx)), max(0, -(-(height - y0) // dy))
            total += rows * (1 + -(-columns * bits // 8)) if columns else 0
        return total


def read_png(body: bytes) -> Png:
    """Take a PNG apart.

    Raises:
        Refused: decode where a checksum is wrong, or the end is missing.
    """
    png = Png()
    for kind, start, end in _png_chunks(body):
        if kind in _PIXELS:
            png.kinds.add(kind)
            if not (kind == b"PLTE" and png.header[9:10] == b"\x02"):  # a mere suggestion beside RGB
                png.parts.append(body[start - 8 : end + 4])
        if kind == b"IHDR":
            png.header = body[start:end]
        elif kind == b"iCCP":
            png.icc = body[start:end]
        elif kind == b"eXIf":
            png.exif = body[start:end]
        elif kind == b"acTL":
            png.frames = max(1, int.from_bytes(body[start : start + 4], "big"))
    return png


def _png_chunks(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk's content, checked, up to IEND."""
    at = len(_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        kind, start = body[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(body[at : at + 4], "big")
        if len(kind) < 4 or end + 4 > len(body):
            raise Refused(Reason.DECODE, "the PNG ends before its end")
        if zlib.crc32(memoryview(body)[at + 4 : end]) != int.from_bytes(body[end : end + 4], "big"):
            raise Refused(Reason.DECODE, f"wrong checksum of the PNG chunk {kind!r}")
        yield kind, start, end
        if kind == b"IEND":
            return
        at = end + 4
    raise Refused(Reason.DECODE, f"more than {MAX_CHUNKS} PNG chunks")


def _webp_chunks(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk's content, within the length that the file declares."""
    whole = 8 + int.from_bytes(body[4:8], "little")
    if whole > len(body):
        raise Refused(Reason.DECODE, f"the WebP ends after {len(body)} of {whole} bytes")
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > whole:
            return
        end = at + 8 + int.from_bytes(body[at + 4 : at + 8], "little")
        if end > whole:
            raise Refused(Reason.DECODE, "a WebP chunk ends outside the file")
        yield body[at : at + 4], at + 8, end
        at = end + (end & 1)
    raise Refused(Reason.DECODE, f"more than {MAX_CHUNKS} WebP chunks")


def check_webp(body: bytes, max_pixels: int) -> int:
    """The number of frames, of a WebP that is whole. Pillow takes memory for the pixels as soon as it opens one.

    Raises:
        Refused: too_many_pixels, or decode where a chunk is cut off.
    """
    frames, size = 0, (0, 0)
    for kind, start, end in _webp_chunks(body):
        data = body[start : min(end, start + 10)]
        if kind == b"VP8X":
            size = 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
        elif kind == b"VP8 " and size == (0, 0):
            size = int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
        elif kind == b"VP8L" and size == (0, 0):
            bits = int.from_bytes(data[1:5], "little")
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        frames += kind == b"ANMF"
    if size[0] * size[1] > max_pixels:
        raise Refused(Reason.TOO_MANY_PIXELS, f"{size[0]} x {size[1]}, {max_pixels} pixels allowed")
    return max(1, frames)


def strip_webp(body: bytes) -> bytes | None:
    """The picture's chunk in a file of its own; None where there is more to it: transparency or animation."""
    pictures = []
    for kind, start, end in _webp_chunks(body):
        if kind in (b"ALPH", b"ANIM", b"ANMF"):
            return None
        if kind in (b"VP8 ", b"VP8L"):
            pictures.append((kind, body[start:end]))
    if len(pictures) != 1:
        return None
    kind, data = pictures[0]
    if kind == b"VP8L" and int.from_bytes(data[1:5], "little") >> 28 & 1:
        return None
    chunk = kind + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) & 1)
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


def count_tiff_pages(body: bytes, limit: int) -> int:
    """Pages of a TIFF, counted to one more than ``limit``: they are a linked list, which may be a ring.

    Raises:
        Refused: decode for a page with more tags than any honest one.
    """
    order = "<" if body[:2] == b"II" else ">"
    pages = 0
    try:
        (at,) = struct.unpack_from(order + "I", body, 4)
        while at and pages <= limit:
            (tags,) = struct.unpack_from(order + "H", body, at)
            if tags > MAX_TIFF_TAGS:
                raise Refused(Reason.DECODE, f"a TIFF page of {tags} tags")
            pages += 1
            (at,) = struct.unpack_from(order + "I", body, at + 2 + 12 * tags)
    except struct.error:  # the list ends outside the file; its first page is the decoder's to judge
        pass
    return max(1, pages)


def count_gif_frames(body: bytes, limit: int) -> int:
    """Frames of a GIF, counted to one more than ``limit``; what is cut off behind the first one does not matter."""
    frames, at = 0, 13 + _palette(body[10:11])
    while frames <= limit and at < len(body):
        block = body[at]
        if block == 0x2C:
            frames += 1
            at = _sub_blocks(body, at + 11 + _palette(body[at + 9 : at + 10]))
        elif block == 0x21:
            at = _sub_blocks(body, at + 2)
        elif block == 0x3B:
            break
        else:
            at += 1
    return max(1, frames)


def _palette(flags: bytes) -> int:
    return 3 * 2 ** (1 + (flags[0] & 7)) if flags and flags[0] & 0x80 else 0


def _sub_blocks(body: bytes, at: int) -> int:
    """Where the chain of blocks of up to 255 bytes ends."""
    while at < len(body) and body[at]:
        at += 1 + body[at]
    return at + 1
