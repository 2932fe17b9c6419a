"""Image files that no encoder writes: headers that lie, bombs, and files of other kinds, byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

from PIL import Image

from tests.hostile.case import Own
from tests.servers import colour

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png_header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    return PNG_MAGIC + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))


def png_of(own: Own, *chunks: bytes, depth: int = 8, pixels: bytes | None = None) -> bytes:
    """The own picture of 24 x 16 as PNG, with further chunks before its pixels; 16 bits a sample where asked."""
    wide = bytes(sample for value in colour(own.number) for sample in [value] * (depth // 8))
    data = (b"\0" + wide * 24) * 16 if pixels is None else pixels
    return b"".join(
        [png_header(24, 16, depth), *chunks, png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b"")]
    )


@cache
def megabyte_of_zeros() -> bytes:
    """1 MiB of zeros as about 1 kB of deflate that can follow itself for ever."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)


def zeros(megabytes: int) -> bytes:
    """So many MiB of zeros as a zlib stream (without its end): a thousandth of that."""
    return b"\x78\xda" + megabyte_of_zeros() * megabytes


def jpeg_sized(own: Own, width: int, height: int) -> bytes:
    """The own picture as JPEG whose header says another size."""
    data = bytearray(own.encoded("jpg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(own: Own, scans: int) -> bytes:
    """A progressive JPEG with so many scans more, each of two bytes: all of its blocks are left as they are."""
    data = own.encoded("jpg", (512, 512), progressive=True)
    table = b"\xff\xc4\x00\x14\x11\x01" + bytes(15) + b"\xe0"  # one AC code, "0": the next 16384 blocks hold nothing
    scan = b"\xff\xda\x00\x08\x01\x01\x01\x01\x05\x00" + b"\x00\x01"
    return data[:-2] + table + scan * scans + b"\xff\xd9"


def gif_of_frames(own: Own, frames: int) -> bytes:
    """So many frames of one pixel each; the first one fills the screen of 1 x 1 with the own colour."""
    start = b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(colour(own.number)) + bytes(3)
    return start + b",\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0" * frames + b";"


def gif_sized(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + bytes(6)
        + (b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02\x44\x01\0;")
    )


def bmp_sized(own: Own, width: int, height: int) -> bytes:
    data = bytearray(own.encoded("bmp"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def webp_sized(own: Own, width: int, height: int) -> bytes:
    """A simple lossy WebP whose frame header says another size (14 bits)."""
    data = bytearray(own.encoded("webp"))
    at = data.index(b"\x9d\x01\x2a") + 3
    data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_lossless_sized(own: Own, width: int, height: int) -> bytes:
    data = bytearray(own.encoded("webp", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little")
    data[at : at + 4] = (bits >> 28 << 28 | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(data)


def webp_canvas(own: Own, width: int, height: int) -> bytes:
    """An extended WebP with this canvas, and a small picture in it."""
    image = own.encoded("webp")[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inner = b"WEBPVP8X\x0a\0\0\0" + bytes(4) + size + image
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def tiff_sized(width: int, height: int) -> bytes:
    """A TIFF of one strip that says this size."""
    tags = [
        (256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, height), (279, 384),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)).ljust(200, b"\0") + bytes(384)


def tiff_in_circles(own: Own) -> bytes:
    """A TIFF whose first directory says that it is the next one, too."""
    data = own.encoded("tiff")
    first = struct.unpack_from("<I", data, 4)[0]
    at = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    return data[:at] + struct.pack("<I", first) + data[at + 4 :]


def avif_sized(own: Own, width: int, height: int) -> bytes:
    data = bytearray(own.encoded("avif", (64, 64)))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


def animation(own: Own, kind: str, frames: int = 3) -> bytes:
    """The own picture, and then others."""
    out = io.BytesIO()
    others = [Image.new("RGB", (24, 16), (10 * i, 255, 0)) for i in range(1, frames)]
    own.image().save(out, kind, save_all=True, append_images=others)
    return out.getvalue()


def transparent(own: Own, kind: str) -> bytes:
    """A picture of which nothing is to be seen."""
    out = io.BytesIO()
    if kind == "P":
        image = Image.new("P", (24, 16), 0)
        image.putpalette([*colour(own.number), 0, 0, 0])
        image.save(out, "PNG", transparency=0)
    else:
        image = own.image(kind)
        image.putalpha(0)
        image.save(out, "PNG")
    return out.getvalue()


def box(kind: bytes, *content: bytes) -> bytes:
    """A box of an MP4-like file."""
    data = b"".join(content)
    return struct.pack(">I", 8 + len(data)) + kind + data


def psd() -> bytes:
    """An empty Photoshop file of 16 x 16."""
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 8, 3) + bytes(12) + b"\0\0" + bytes(768)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="16"><rect width="24" height="16" fill="red"/></svg>'
XXE = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    b'<svg xmlns="http://www.w3.org/2000/svg"><text>&x;</text></svg>'
)
LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a0 "lol">'
    + b"".join(b'<!ENTITY a%d "%b">' % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 10))
    + b']><svg xmlns="http://www.w3.org/2000/svg"><text>&a9;</text></svg>'
)
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n%%EOF"
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n%%EndComments\n"
    b"(%pipe%touch /tmp/clipmill-was-here) (w) file\nshowpage\n%%EOF\n"
)
