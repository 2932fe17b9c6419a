"""Which format bytes are of, by their content alone: no file name, no Content-Type, no decoder."""

from __future__ import annotations

import re
from collections.abc import Collection

from pipeline.download.web.policy import Refused
from schemas.errors import Reason

FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")
"""Those that we decode, with decoders inside Pillow, OpenCV and libjpeg-turbo: never an outside program."""

_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"II\xbc", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\x01\0", "ICO"),
    (b"\0\0\x02\0", "CUR"),
    (b"icns", "ICNS"),
    (b"\x8aMNG", "MNG"),
    (b"\x8bJNG", "JNG"),
    (b"\x1aE\xdf\xa3", "Matroska"),
    (b"gimp xcf", "XCF"),
    (b"DDS ", "DDS"),
    (b"#?RADIANCE", "HDR"),
    (b"v/1\x01", "OpenEXR"),
    (b"qoif", "QOI"),
    (b"AT&TFORM", "DjVu"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"/* XPM */", "XPM"),
    (b"SIMPLE  =", "FITS"),
    (b"BPG\xfb", "BPG"),
)
_PNM = re.compile(rb"P[1-7]\s")
_SVG = re.compile(rb"<(?:[a-z]+:)?svg[\s>]", re.IGNORECASE)
_LOOKED_AT = 4096


def sniff(body: bytes, allowed: Collection[str]) -> str:
    """The format of ``body``, one of ``allowed``.

    Raises:
        Refused: format_refused for another known format, not_an_image for what is none that we know.
    """
    kind = _kind(body)
    if kind is None:
        raise Refused(Reason.NOT_AN_IMAGE, "no known image format")
    if kind not in allowed:
        raise Refused(Reason.FORMAT_REFUSED, f"the format {kind} is not let in")
    return kind


def _kind(body: bytes) -> str | None:
    for start, kind in _STARTS:
        if body.startswith(start):
            return kind
    if body[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "AVI"}.get(body[8:12])
    if body[4:8] == b"ftyp":
        return _iso_brand(body)
    # Two letters are a weak signature: the length of the header that follows must be one there is, too.
    if body[:2] == b"BM" and body[14:18] in _BMP_HEADERS:
        return "bmp"
    return _text_kind(body[:_LOOKED_AT])


_BMP_HEADERS = {n.to_bytes(4, "little") for n in (12, 16, 40, 52, 56, 64, 108, 124)}


def _iso_brand(body: bytes) -> str:
    """AVIF, HEIC and films share a container; its first box lists the brands."""
    brands = body[8 : min(int.from_bytes(body[:4], "big"), 256)]
    if b"avif" in brands or b"avis" in brands:
        return "avif"
    return "HEIC" if any(b in brands for b in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1")) else "MP4"


def _text_kind(head: bytes) -> str | None:
    if b"%PDF-" in head[:1024]:
        return "PDF"
    if _PNM.match(head):
        return "PNM"
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe\t\r\n ")  # UTF-16 shows as ASCII without its zeros
    if text.startswith(b"<") and not text[:14].lower().startswith(b"<!doctype html") and _SVG.search(text):
        return None if text[:5].lower() == b"<html" else "SVG"
    return None
