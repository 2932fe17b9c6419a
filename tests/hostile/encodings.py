"""Content-Encoding: honest though not asked for, lying, nested, and bombs."""

from __future__ import annotations

import gzip
import zlib

import pyarrow as pa

from tests.hostile.case import MAX_BYTES, Body, Case, Own, chunk, head, png, raw, served
from tests.hostile.files import megabyte_of_zeros, zeros
from tests.servers import Repeat

_UNDECODED = "bad_response|truncated|not_an_image|decode"
_ZEROS = bytes(1 << 20)


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def _arrow(data: bytes, codec: str) -> bytes:
    return pa.compress(data, codec=codec, asbytes=True)


def _encoded(name: str, expected: str, encoding: str, content: Body) -> Case:
    return served(f"encoding-{name}", expected, f"Content-Encoding: {encoding}", content=content)


_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"


def _gzip_bomb(own: Own) -> bytes:
    """A picture, then 800 MiB of zeros, in less bytes than a body may have."""
    packer = zlib.compressobj(9, wbits=-15)
    start = packer.compress(png(own)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = _GZIP_HEAD + start + megabyte_of_zeros() * 800
    assert len(data) < MAX_BYTES
    return data


def _zlib_bomb(own: Own) -> bytes:
    return zeros(800)


def _brotli_bomb(own: Own) -> bytes:
    return _arrow(png(own) + _ZEROS * 100, "brotli")


def _zstd_bomb(own: Own) -> bytes:
    return _arrow(png(own) + _ZEROS * 100, "zstd")


def _padded_gzip(own: Own) -> bytes:
    """As many bytes after decompression as are allowed."""
    return gzip.compress(png(own).ljust(MAX_BYTES, b"\0"))


def _long_gzip_name(own: Own) -> bytes:
    return b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"n" * 200_000 + b"\0" + gzip.compress(png(own))[10:]


CASES = [
    _encoded("gzip", "ok", "gzip", lambda own: gzip.compress(png(own))),
    _encoded("x-gzip", "ok", "x-gzip", lambda own: gzip.compress(png(own))),
    _encoded("gzip-upper-case", "ok", "GZIP", lambda own: gzip.compress(png(own))),
    _encoded("deflate", "ok", "deflate", lambda own: zlib.compress(png(own))),
    _encoded("deflate-raw", "ok|" + _UNDECODED, "deflate", lambda own: _raw_deflate(png(own))),
    _encoded("brotli", "ok", "br", lambda own: _arrow(png(own), "brotli")),
    _encoded("zstd", "ok|bad_response|not_an_image", "zstd", lambda own: _arrow(png(own), "zstd")),
    _encoded("identity", "ok", "identity", png),
    _encoded("empty-name", "ok", "", png),
    _encoded("none", "ok|bad_response", "none", png),
    _encoded("unknown", "ok|bad_response|not_an_image", "rot13", png),
    _encoded("compress", "bad_response|not_an_image", "compress", b"\x1f\x9d\x90" + b"a" * 50),
    _encoded("gzip-twice", "ok|bad_response|not_an_image", "gzip, gzip",
             lambda own: gzip.compress(gzip.compress(png(own)))),
    served("encoding-gzip-twice-in-two-headers", "ok|bad_response|not_an_image", "Content-Encoding: gzip",
           "Content-Encoding: gzip", content=lambda own: gzip.compress(gzip.compress(png(own)))),
    _encoded("gzip-twice-said-once", "not_an_image|bad_response", "gzip",
             lambda own: gzip.compress(gzip.compress(png(own)))),
    _encoded("brotli-of-gzip", "ok|bad_response|not_an_image", "gzip, br",
             lambda own: _arrow(gzip.compress(png(own)), "brotli")),
    _encoded("gzip-100-times-said", "ok|" + _UNDECODED, ", ".join(["gzip"] * 100), lambda own: gzip.compress(png(own))),
    _encoded("gzip-of-nothing", "empty_body", "gzip", gzip.compress(b"")),
    _encoded("gzip-empty-body", "empty_body|truncated|bad_response", "gzip", b""),
    _encoded("gzip-members", "ok|" + _UNDECODED, "gzip",
             lambda own: gzip.compress(png(own)[:30]) + gzip.compress(png(own)[30:])),
    _encoded("gzip-long-name", "ok|bad_response|truncated", "gzip", _long_gzip_name),
    _encoded("gzip-lie-image", "ok|" + _UNDECODED, "gzip", png),
    _encoded("gzip-lie-text", _UNDECODED, "gzip", b"not gzip at all"),
    _encoded("brotli-lie", _UNDECODED, "br", b"\xff" * 100),
    _encoded("deflate-lie", _UNDECODED, "deflate", b"\xff" * 100),
    _encoded("gzip-truncated", _UNDECODED, "gzip", lambda own: gzip.compress(own.encoded("bmp"))[:-20]),
    _encoded("gzip-bad-sum", "ok|" + _UNDECODED, "gzip", lambda own: gzip.compress(png(own))[:-8] + bytes(8)),
    _encoded("gzip-damaged", "empty_body|" + _UNDECODED, "gzip",
             lambda own: gzip.compress(own.encoded("bmp", (64, 64)))[:20] + b"\xff" * 60),
    _encoded("gzip-garbage-after", "ok|bad_response", "gzip", lambda own: gzip.compress(png(own)) + b"garbage"),
    served("encoding-not-said-gzip", "not_an_image", content=lambda own: gzip.compress(png(own))),
    # Bombs: what counts are the bytes after decompression
    _encoded("gzip-as-much-as-allowed", "ok", "gzip", _padded_gzip),
    _encoded("gzip-a-byte-more", "too_large", "gzip",
             lambda own: gzip.compress(png(own).ljust(MAX_BYTES + 1, b"\0"))),
    _encoded("bomb-gzip", "too_large", "gzip", _gzip_bomb),
    _encoded("bomb-deflate", "too_large", "deflate", _zlib_bomb),
    _encoded("bomb-brotli", "too_large", "br", _brotli_bomb),
    _encoded("bomb-zstd", "too_large|bad_response|not_an_image", "zstd", _zstd_bomb),
    _encoded("bomb-gzip-twice", "too_large|bad_response|not_an_image", "gzip, gzip",
             lambda own: gzip.compress(_gzip_bomb(own))),
    raw("encoding-bomb-gzip-10-gib", "too_large",
        head("200 OK", "Content-Encoding: gzip", "Transfer-Encoding: chunked"), "\r\n", chunk(_GZIP_HEAD),
        Repeat(chunk(megabyte_of_zeros()), 10_240)),
]  # fmt: skip
