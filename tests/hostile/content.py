"""What is inside: images in every state of repair, bombs, and things that are no images."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any

from tests.hostile import files
from tests.hostile.case import Body, Case, Own, png, raw, served
from tests.hostile.files import box, png_chunk, png_header, png_of
from tests.servers import Repeat, colour

_KINDS = ("jpg", "png", "webp", "gif", "bmp", "tiff", "avif")
_OTHER = "format_refused|not_an_image"
_MANY = "too_many_pixels"
_HURT = "decode|not_an_image|truncated"
_WHITE, _GREY, _BLACK = 1110, 444, 0
"""Numbers of pictures that stay what they are without colour; and of what lies under a transparent one."""


def _file(name: str, expected: str, content: Body, *headers: str, **more: Any) -> Case:
    return served(f"file-{name}", expected, *headers, content=content, **more)


def _noise(own: Own, kind: str) -> bytes:
    """The own picture with stripes, some kilobytes long, so that there is something to damage."""
    image = own.image(size=(96, 96))
    for i in range(96):
        for j in range(0, 96, 3):
            image.putpixel((i, j), (i * j % 256, i * 7 % 256, j * 5 % 256))
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return out.getvalue()


def _cut(kind: str, share: float) -> Callable[[Own], bytes]:
    def content(own: Own) -> bytes:
        data = _noise(own, kind)
        return data[: max(1, int(len(data) * share))]

    return content


def _zeroed(kind: str) -> Callable[[Own], bytes]:
    def content(own: Own) -> bytes:
        data = _noise(own, kind)
        third = len(data) // 3
        return data[:third] + bytes(third) + data[2 * third :]

    return content


def _as(kind: str, mode: str = "RGB", **how: Any) -> Callable[[Own], bytes]:
    return lambda own: own.encoded(kind, mode=mode, **how)


def _hurt(kind: str) -> list[Case]:
    """The states of one format. What is damaged may not come out as a picture that is half grey."""
    # Nothing in these formats tells zeros in the middle from a black stripe.
    mid = "decode|ok" if kind in ("bmp", "tiff", "jpg", "gif", "webp", "avif") else "decode"
    return [
        _file(f"{kind}-good", "ok", _as(kind), size=(24, 16), http_status=200),
        _file(f"{kind}-cut-at-a-tenth", _HURT, _cut(kind, 0.1)),
        _file(f"{kind}-cut-in-half", "decode|truncated", _cut(kind, 0.5)),
        _file(f"{kind}-cut-at-the-end", "decode|truncated", _cut(kind, 0.9)),
        _file(f"{kind}-zeros-inside", mid, _zeroed(kind), number=-2),
        _file(f"{kind}-zeros-after", "ok", lambda own: own.encoded(kind) + bytes(5_000)),
    ]


_IDAT_AND_END = png_chunk(b"IDAT", zlib.compress(bytes(4096))) + png_chunk(b"IEND", b"")

_BOMBS = [
    _file("png-30000", _MANY, png_header(30_000, 30_000) + _IDAT_AND_END),
    _file("png-just-too-many", _MANY, png_header(2001, 2000) + _IDAT_AND_END),
    _file("png-30000-cut", _MANY + "|decode", png_header(30_000, 30_000) + png_chunk(b"IDAT", zlib.compress(b""))),
    _file("png-2-to-31", _MANY + "|decode", png_header(2**31 - 1, 2**31 - 1) + png_chunk(b"IDAT", b"")),
    _file("png-2-to-32", _MANY + "|decode|not_an_image", png_header(2**32 - 1, 2**32 - 1)),
    _file("png-one-line", _MANY + "|decode", png_header(2**31 - 1, 1) + png_chunk(b"IDAT", zlib.compress(bytes(4096)))),
    _file("jpg-65535", _MANY, lambda own: files.jpeg_sized(own, 65_535, 65_535)),
    _file("gif-65535", _MANY, files.gif_sized(65_535, 65_535)),
    _file("bmp-2-to-31", _MANY + "|decode", lambda own: files.bmp_sized(own, 2**31 - 1, 2**31 - 1)),
    _file("bmp-upside-down", _MANY + "|decode", lambda own: files.bmp_sized(own, 60_000, -60_000)),
    _file("bmp-negative-width", _HURT + "|" + _MANY, lambda own: files.bmp_sized(own, -60_000, 60_000)),
    _file("webp-16383", _MANY + "|decode", lambda own: files.webp_sized(own, 16_383, 16_383)),
    _file("webp-lossless-16384", _MANY + "|decode", lambda own: files.webp_lossless_sized(own, 16_384, 16_384)),
    _file("webp-canvas-2-to-24", _MANY + "|" + _HURT, lambda own: files.webp_canvas(own, 2**24, 2**8)),
    _file("tiff-65535", _MANY, files.tiff_sized(65_535, 65_535)),
    _file("tiff-2-to-32", _MANY + "|decode", files.tiff_sized(2**32 - 1, 2**32 - 1)),
    _file("avif-65535", _MANY + "|decode", lambda own: files.avif_sized(own, 65_535, 65_535)),
    _file("png-idat-bomb", "ok|decode", lambda own: png_header(24, 16)
          + png_chunk(b"IDAT", files.zeros(700)) + png_chunk(b"IEND", b""), number=-2),
    _file("png-icc-bomb", "ok|decode", lambda own: png_of(own, png_chunk(b"iCCP", b"p\0\0" + files.zeros(700)))),
    _file("png-ztxt-bomb", "ok|decode", lambda own: png_of(own, png_chunk(b"zTXt", b"k\0\0" + files.zeros(700)))),
    _file("png-itxt-bomb", "ok|decode",
          lambda own: png_of(own, png_chunk(b"iTXt", b"k\0\1\0\0\0" + files.zeros(700)))),
    _file("png-60000-chunks", "ok|decode", lambda own: png_of(own, png_chunk(b"tEXt", b"k\0v") * 60_000)),
    _file("jpg-1000-scans", "ok|decode|too_many_frames", lambda own: files.jpeg_of_scans(own, 1_000)),
    _file("jpg-60000-markers", "ok|decode", lambda own: own.encoded("jpg")[:2] + b"\xff\xfe\0\x06abcd" * 60_000
          + own.encoded("jpg")[2:]),
    _file("gif-10000-frames", "too_many_frames", lambda own: files.gif_of_frames(own, 10_000)),
    _file("gif-1000-frames", "ok", lambda own: files.gif_of_frames(own, 1_000), size=(1, 1)),
    _file("tiff-in-circles", "ok|decode|too_many_frames", files.tiff_in_circles),
    _file("png-apng-says-many-frames", "ok|too_many_frames",
          lambda own: png_of(own, png_chunk(b"acTL", struct.pack(">II", 100_000, 0)))),
]  # fmt: skip

_BROKEN = [
    _file("png-bad-crc-of-header", "decode|not_an_image|ok",
          lambda own: png_of(own).replace(png_header(24, 16)[-4:], b"\1\2\3\4", 1)),
    _file("png-bad-crc-of-pixels", "decode", lambda own: png_of(own)[:-16] + b"\1\2\3\4" + png_of(own)[-12:]),
    _file("png-no-width", _HURT, png_header(0, 16) + png_chunk(b"IDAT", zlib.compress(b""))),
    _file("png-no-size", _HURT, png_header(0, 0) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")),
    _file("png-no-pixels", _HURT, png_header(24, 16) + png_chunk(b"IEND", b"")),
    _file("png-half-of-its-pixels", "decode", lambda own: png_of(own, pixels=(b"\0" + bytes(72)) * 8)),
    _file("png-no-end", "ok|decode", lambda own: png_of(own)[:-12]),
    _file("png-chunk-of-4-gib", _HURT, lambda own: png_header(24, 16) + b"\xff\xff\xff\xffIDAT" + bytes(100)),
    _file("png-unknown-critical-chunk", "ok|decode", lambda own: png_of(own, png_chunk(b"EVIL", b"x"))),
    _file("png-depth-3", _HURT, png_header(24, 16, 3) + png_chunk(b"IDAT", zlib.compress(bytes(2_000)))),
    _file("png-palette-missing", _HURT + "|ok", png_header(24, 16, 8, 3)
          + png_chunk(b"IDAT", zlib.compress(bytes(25 * 16))) + png_chunk(b"IEND", b""), number=-2),
    _file("png-second-header", "ok|decode|too_many_pixels", lambda own: png_of(own, png_header(30_000, 30_000)[8:])),
    _file("jpg-no-size", _HURT, lambda own: files.jpeg_sized(own, 0, 0)),
    _file("jpg-larger-than-its-data", "decode", lambda own: files.jpeg_sized(own, 1_800, 1_800)),
    # The tables of the standard's annex K are known without being said.
    _file("jpg-no-tables", "ok|decode", lambda own: own.encoded("jpg").replace(b"\xff\xc4", b"\xff\xfe")),
    _file("gif-no-size", _HURT + "|ok", files.gif_sized(0, 0)),
    _file("gif-larger-than-its-data", "decode", files.gif_sized(1_800, 1_800)),
    _file("gif-no-frames", _HURT, lambda own: files.gif_of_frames(own, 0)),
    _file("bmp-no-size", _HURT, lambda own: files.bmp_sized(own, 0, 0)),
    _file("bmp-larger-than-its-data", "decode", lambda own: files.bmp_sized(own, 1_800, 1_800)),
    _file("tiff-larger-than-its-data", "decode", files.tiff_sized(1_800, 1_800)),
    _file("webp-larger-than-its-data", "decode", lambda own: files.webp_sized(own, 1_800, 1_800)),
    _file("avif-two-sizes", "decode|ok", lambda own: files.avif_sized(own, 65, 64)),
    *[
        _file(f"only-magic-{name}", _HURT, magic)
        for name, magic in {
            "jpg": b"\xff\xd8\xff", "png": files.PNG_MAGIC, "gif": b"GIF89a", "webp": b"RIFF\x24\0\0\0WEBPVP8 ",
            "bmp": b"BM", "tiff-ii": b"II*\0", "tiff-mm": b"MM\0*", "avif": box(b"ftyp", b"avif\0\0\0\0avifmif1"),
        }.items()
    ],
]  # fmt: skip

_SOUND = [
    _file("jpg-progressive", "ok", _as("jpg", progressive=True)),
    _file("jpg-grey", "ok", _as("jpg", "L"), number=_GREY),
    _file("jpg-cmyk", "ok", _as("jpg", "CMYK"), number=_GREY),
    _file("jpg-quality-1", "ok", _as("jpg", quality=1), number=-2),
    _file("jpg-2000-pixels-wide", "ok", lambda own: own.encoded("jpg", (2_000, 2_000)), size=(2_000, 2_000)),
    _file("jpg-several-pictures", "ok", lambda own: files.animation(own, "MPO")),
    _file("png-16-bit", "ok", lambda own: png_of(own, depth=16)),
    _file("png-16-bit-grey", "ok", lambda own: png_header(1, 1, 16, 0) + png_chunk(
        b"IDAT", zlib.compress(b"\0" + bytes([colour(own.number)[0]] * 2))) + png_chunk(b"IEND", b""), number=_GREY),
    _file("png-palette", "ok", _as("png", "P")),
    _file("png-palette-transparent", "ok", lambda own: files.transparent(own, "P"), number=_WHITE),
    _file("png-alpha-opaque", "ok", _as("png", "RGBA")),
    _file("png-alpha-transparent", "ok", lambda own: files.transparent(own, "RGBA"), number=_WHITE),
    _file("png-grey", "ok", _as("png", "L"), number=_GREY),
    _file("png-grey-alpha", "ok", _as("png", "LA"), number=_GREY),
    _file("png-1-bit", "ok", _as("png", "1"), number=_BLACK),
    _file("png-1-pixel", "ok", lambda own: own.encoded("png", (1, 1)), size=(1, 1)),
    _file("png-1-pixel-high", "ok", lambda own: own.encoded("png", (3_000, 1)), size=(3_000, 1)),
    _file("png-animated", "ok", lambda own: files.animation(own, "PNG")),
    _file("gif-animated", "ok", lambda own: files.animation(own, "GIF")),
    _file("gif-comment", "ok", lambda own: own.encoded("gif", comment=b"x" * 60_000)),
    _file("webp-animated", "ok", lambda own: files.animation(own, "WEBP")),
    _file("webp-lossless", "ok", _as("webp", lossless=True)),
    _file("webp-alpha", "ok", _as("webp", "RGBA", lossless=True)),
    _file("avif-animated", "ok", lambda own: files.animation(own, "AVIF")),
    _file("tiff-pages", "ok", lambda own: files.animation(own, "TIFF")),
    _file("tiff-lzw", "ok", _as("tiff", compression="tiff_lzw")),
    _file("tiff-deflate", "ok", _as("tiff", compression="tiff_adobe_deflate")),
    _file("tiff-cmyk", "ok", _as("tiff", "CMYK"), number=_GREY),
    _file("tiff-1-bit-fax", "ok", _as("tiff", "1", compression="group4"), number=_BLACK),
    _file("tiff-float", "ok|decode|format_refused", _as("tiff", "F"), number=-2),
    _file("bmp-palette", "ok", _as("bmp", "P")),
    _file("bmp-1-bit", "ok", _as("bmp", "1"), number=_BLACK),
    # More than one thing at once
    _file("gif-and-script", "ok", lambda own: own.encoded("gif") + b"/*';alert(1)//*/"),
    _file("jpg-and-zip", "ok", lambda own: own.encoded("jpg") + b"PK\x03\x04" + bytes(500) + b"PK\x05\x06" + bytes(18)),
    _file("png-and-php", "ok", lambda own: png(own) + b"<?php system($_GET['c']); ?>"),
    _file("jpg-with-html-comment", "ok", lambda own: own.encoded("jpg", comment=b"<script>alert(1)</script>")),
    _file("pdf-with-jpg", _OTHER, lambda own: files.PDF + own.encoded("jpg")),
    _file("html-with-jpg", _OTHER, lambda own: b"<html><!--" + own.encoded("jpg") + b"--></html>"),
    _file("space-before-png", "not_an_image", lambda own: b"\n" + png(own)),
    # What the headers say of it
    _file("png-as-html", "ok", png, "Content-Type: text/html; charset=utf-8"),
    _file("png-as-svg", "ok", png, "Content-Type: image/svg+xml"),
    _file("png-as-bytes", "ok", png, "Content-Type: application/octet-stream"),
    _file("png-as-nonsense", "ok", png, "Content-Type: ;;;=/%00"),
    _file("png-as-two-types", "ok", png, "Content-Type: text/html", "Content-Type: image/gif"),
    _file("png-as-attachment", "ok", png, 'Content-Disposition: attachment; filename="../../../etc/passwd"'),
    _file("html-as-jpg", "not_an_image", b"<!doctype html><html><body>gone</body></html>", "Content-Type: image/jpeg"),
    raw("file-mjpeg-endless", "timeout|not_an_image|too_large",
        "HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n",
        Repeat(b"--b\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff\xd9\r\n", 1_000, 0.2)),
]  # fmt: skip

_OTHERS = {  # images, or at least pictures, that are not let in
    "svg": files.SVG, "svg-entity": files.XXE, "svg-billion-laughs": files.LAUGHS, "pdf": files.PDF, "psd": files.psd(),
    "svg-comment-first": b"<?xml version='1.0'?>\n<!-- a comment -->\n<!DOCTYPE svg>\n" + files.SVG,
    "svg-bom": b"\xef\xbb\xbf" + files.SVG,
    "svg-file": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "svg-long": files.SVG.replace(b"/></svg>", b"/>" + b"<g/>" * 20_000 + b"</svg>"),
    "eps": files.EPS, "ps": b"%!PS-Adobe-3.0\n" + files.EPS,
}  # fmt: skip

_OTHERS_LOOSELY = {
    "svgz": gzip.compress(files.SVG), "svg-utf-16": files.SVG.decode().encode("utf-16"),
    "eps-binary": b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(files.EPS), 0, 0, 0, 0) + b"\xff\xff" + files.EPS,
    "heic": box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", bytes(20)), "jxl": b"\xff\x0a" + bytes(50),
    "jxl-container": b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"ftyp", b"jxl \0\0\0\0jxl "),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60), "emf": b"\x01\0\0\0\x6c\0\0\0" + bytes(32) + b" EMF" + bytes(60),
    "xbm": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x00};\n",
    "xpm": b'/* XPM */\nstatic char * a[] = {\n"1 1 1 1",\n"a c #ff0000",\n"a"};\n',
    "ppm": b"P6 2 2 255\n" + bytes(12), "pfm": b"PF\n1 1\n-1.0\n" + bytes(12),
    "dds": b"DDS " + struct.pack("<I", 124) + bytes(120), "fits": b"SIMPLE  =                    T".ljust(2880),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100), "qoi": b"qoif\0\0\0\x01\0\0\0\x01\x03\0\xfe\1\2\3" + bytes(7) + b"\1",
    "exr": b"\x76\x2f\x31\x01" + bytes(60), "djvu": b"AT&TFORM" + bytes(30), "xcf": b"gimp xcf v011\0" + bytes(50),
    "icns-header": b"icns\0\0\0\x08", "cursor": b"\0\0\x02\0\x01\0" + bytes(40), "flif": b"FLIF44\x01\x01" + bytes(9),
    "mp4": box(b"ftyp", b"isom\0\0\2\0isomiso2mp41") + box(b"mdat", bytes(99)),
    "webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01webm", "avi": b"RIFF\x64\0\0\0AVI LIST" + bytes(90),
    "mng": b"\x8aMNG\r\n\x1a\n" + bytes(40), "flv": b"FLV\x01\x05\0\0\0\x09" + bytes(9),
}  # fmt: skip

_NO_IMAGES = {
    "html": b"<!doctype html><title>404</title>", "json": b'{"error": "not found"}', "text": b"hello",
    "xml": b'<?xml version="1.0"?><rss><channel/></rss>', "one-byte": b"\xff", "one-nul": b"\0", "nuls": bytes(4_096),
    "zip": b"PK\x03\x04" + bytes(60), "gzip": gzip.compress(b"text"), "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
    "exe": b"MZ" + bytes(200), "script": b"#!/bin/sh\nid\n", "sqlite": b"SQLite format 3\0" + bytes(84),
    "pickle": pickle.dumps(print), "pickle-code": b"cos\nsystem\n(S'touch /tmp/clipmill-was-here'\ntR.",
    "npy": b"\x93NUMPY\x01\0", "wasm": b"\0asm\x01\0\0\0", "font": b"\0\1\0\0\0\x0f\0\x80", "ogg": b"OggS" + bytes(60),
    "mp3": b"ID3\x03" + bytes(60), "riff-wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(20), "tar": bytes(10_240),
    "almost-png": b"\x89PNG\n\x1a\n" + bytes(40), "almost-gif": b"GIF90a" + bytes(40),
    "upside-down-jpg": b"\xd8\xff" * 20,
    "csv": b"url,caption\nhttp://a/,b\n", "robots": b"User-agent: *\nDisallow: /\n",
    "base64": b"iVBORw0KGgoAAAANSUhEUg==",
    "data-url": b"data:image/png;base64,iVBORw0KGgo=", "spaces": b" " * 1_000, "newline": b"\n",
    "http-answer": b"HTTP/1.1 200 OK\r\n\r\n",
}  # fmt: skip

CASES = [
    *[case for kind in _KINDS for case in _hurt(kind)],
    *_BOMBS, *_BROKEN, *_SOUND,
    *[_file(f"other-{name}", "format_refused", data) for name, data in _OTHERS.items()],
    *[_file(f"other-{name}", _OTHER, data) for name, data in _OTHERS_LOOSELY.items()],
    _file("other-ico", _OTHER, _as("ico")),
    _file("other-jpeg-2000", _OTHER, _as("jpeg2000")),
    _file("other-jpeg-2000-stream", _OTHER, _as("jpeg2000", no_jp2=True)),
    _file("other-tga", _OTHER, _as("tga")),
    _file("other-pcx", _OTHER, _as("pcx")),
    _file("other-sgi", _OTHER, _as("sgi")),
    *[_file(f"none-{name}", "not_an_image", data) for name, data in _NO_IMAGES.items()],
    _file("none-empty", "empty_body", b""),
]  # fmt: skip
