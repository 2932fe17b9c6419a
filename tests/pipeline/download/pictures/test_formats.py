"""Formats by content: what is known, what is known and refused, and what is nothing."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.download.pictures.formats import FORMATS, sniff
from pipeline.download.web.policy import Refused
from schemas.errors import Reason
from tests.pipeline.download.pictures.pictures import encode

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize("kind", FORMATS)
def test_what_pillow_writes_is_recognised(kind: str) -> None:
    assert sniff(encode(np.zeros((4, 4, 3), np.uint8), kind.upper()), FORMATS) == kind


def test_heic_shares_a_container_with_avif() -> None:
    def ftyp(*brands: bytes) -> bytes:
        content = b"ftyp" + brands[0] + b"\0\0\0\0" + b"".join(brands[1:])
        return (4 + len(content)).to_bytes(4, "big") + content

    assert sniff(ftyp(b"mif1", b"miaf", b"avif"), FORMATS) == "avif"
    for brands in ((b"heic", b"mif1"), (b"mif1", b"heic"), (b"isom", b"mp42"), (b"qt  ",)):
        with pytest.raises(Refused) as caught:
            sniff(ftyp(*brands), FORMATS)
        assert caught.value.reason is Reason.FORMAT_REFUSED


@pytest.mark.parametrize(
    "body",
    [
        SVG,
        b'<?xml version="1.0"?>\n<!-- made by hand -->\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x">\n' + SVG,
        b"\xef\xbb\xbf \n" + SVG,
        SVG.decode().encode("utf-16"),
        b'<!DOCTYPE svg [<!ENTITY a "b">]>' + SVG,
        b"%PDF-1.7\n",
        b"\n\n%PDF-1.4\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\xc5\xd0\xd3\xc6\x20\0\0\0",
        b"8BPS\0\x01",
        b"\0\0\x01\0\x01\0",
        b"\xff\x0a\xfa\x1f",
        b"\0\0\0\x0cJXL \r\n\x87\n",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"P6\n4 4\n255\n",
        b"RIFF\x24\0\0\0AVI LIST",
        b"II+\0\x08\0\0\0",
    ],
)
def test_known_formats_that_are_not_let_in(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        sniff(body, FORMATS)
    assert caught.value.reason is Reason.FORMAT_REFUSED


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xd8",
        b"<!DOCTYPE html><html><body>not found</body></html>",
        b"<html><body>" + SVG + b"</body></html>",
        b"  <!doctype html><p>" + SVG,
        b'{"error": 404}',
        b"BM, said the letter",
        b"RIFF\x24\0\0\0WAVEfmt ",
        gzip.compress(SVG),
        b"\x7fELF\x02\x01\x01",
        bytes(1000),
    ],
)
def test_what_is_no_image(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        sniff(body, FORMATS)
    assert caught.value.reason is Reason.NOT_AN_IMAGE


@given(st.binary(max_size=64))
def test_any_bytes_have_an_answer(body: bytes) -> None:
    try:
        assert sniff(body, FORMATS) in FORMATS
    except Refused as refused:
        assert refused.reason in (Reason.NOT_AN_IMAGE, Reason.FORMAT_REFUSED)
