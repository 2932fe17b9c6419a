"""JPEG: its header against Pillow's reading, scales, damage, bombs, and what is left when metadata is gone."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.download.pictures.images import ImageStage
from pipeline.download.pictures.jpeg import MAX_SCANS, Jpeg
from pipeline.download.web.policy import Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason
from tests.pipeline.download.pictures.pictures import decode, encode, photo, psnr

FORMS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"subsampling": 1},
    {"optimize": True},
    {"restart_marker_blocks": 3},
]
STAGE = ImageStage(DownloadConfig())


def refused(body: bytes, stage: ImageStage = STAGE) -> Refused:
    with pytest.raises(Refused) as caught:
        stage(body)
    return caught.value


@pytest.mark.parametrize("form", FORMS)
def test_header_and_pixels_are_pillows(form: dict[str, Any]) -> None:
    body = encode(photo(93, 71, 1), "JPEG", **form)
    read = Jpeg(body)
    assert (read.width, read.height, read.components, read.orientation, read.icc) == (93, 71, 3, 1, None)
    assert psnr(read.pixels((93, 71)), decode(body)) > 50  # two versions of one library


def test_a_large_profile_in_many_segments() -> None:
    profile = bytes(range(256)) * 800  # 200 KB: four segments
    assert Jpeg(encode(photo(16, 16, 1), "JPEG", icc_profile=profile)).icc == profile


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((256, 192), (256, 192)),
        ((257, 192), (512, 384)),
        ((128, 96), (128, 96)),
        ((1, 1), (128, 96)),
        ((600, 1), (1024, 768)),
    ],
)
def test_no_more_is_decoded_than_needed(size: tuple[int, int], decoded: tuple[int, int]) -> None:
    picture = photo(1024, 768, 3, grain=0)
    pixels = Jpeg(encode(picture, "JPEG", quality=95)).pixels(size)
    assert pixels.shape == (decoded[1], decoded[0], 3)
    step = 1024 // decoded[0]
    mean = picture.reshape(decoded[1], step, decoded[0], step, 3).mean(axis=(1, 3))
    assert psnr(pixels, mean.astype(np.uint8)) > 32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [64, 700])
def test_truncated_ones_are_refused_kept_or_resized(form: dict[str, Any], side: int) -> None:
    body = encode(photo(side, side, 4), "JPEG", **form)
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        cut = body[: int(len(body) * share)]
        assert refused(cut).reason is Reason.DECODE
        if share > 0.3:  # as a broken-off upload that somebody closed properly
            assert refused(cut.rstrip(b"\xff") + b"\xff\xd9").reason is Reason.DECODE
    assert refused(body[:-2]).reason is Reason.DECODE


@pytest.mark.parametrize("side", [64, 700])
def test_a_hole_of_zeros_is_damage(side: int) -> None:
    body = bytearray(encode(photo(side, side, 5), "JPEG"))
    half = len(body) // 2
    body[half : half + len(body) // 8] = bytes(len(body) // 8)
    assert refused(bytes(body)).reason is Reason.DECODE


def resized(body: bytes, width: int, height: int) -> bytes:
    """The same bytes with another size in the frame header."""
    at = next(i for i in (body.find(b"\xff\xc0"), body.find(b"\xff\xc2")) if i > 0)
    return body[: at + 5] + struct.pack(">HH", height, width) + body[at + 9 :]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_header_that_promises_more(progressive: bool) -> None:
    body = encode(photo(64, 64, 6), "JPEG", progressive=progressive)
    assert refused(resized(body, 9000, 9000)).reason is Reason.DECODE
    assert refused(resized(body, 64, 640)).reason is Reason.DECODE
    assert refused(resized(body, 60_000, 60_000)).reason is Reason.TOO_MANY_PIXELS
    assert refused(resized(body, 0, 64)).reason is Reason.DECODE


def test_hundreds_of_scans_are_refused_before_decoding() -> None:
    body = encode(photo(64, 64, 7), "JPEG", progressive=True)
    last = body.rindex(b"\xff\xda")
    scan = body[last:-2]
    assert Jpeg(body)._scans < 20
    bomb = body[:-2] + scan * MAX_SCANS + b"\xff\xd9"
    with pytest.raises(Refused, match="scans"):
        STAGE(bomb)
    few = DownloadConfig(max_pixels=64 * 64)
    assert ImageStage(few)(body).width == 64
    with pytest.raises(Refused, match="scans"):  # at the limit of pixels, fewer scans are let in
        ImageStage(few)(body[:-2] + scan * 16 + b"\xff\xd9")


def test_kinds_that_browsers_do_not_show() -> None:
    body = encode(photo(32, 32, 8), "JPEG")
    arithmetic = body.replace(b"\xff\xc0", b"\xff\xc9", 1)
    deep = body.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c", 1)
    assert refused(arithmetic).reason is Reason.FORMAT_REFUSED
    assert refused(deep).reason is Reason.FORMAT_REFUSED


def test_a_scan_header_that_phones_write() -> None:
    """Its last three bytes mean something in progressive JPEGs only; every browser passes over them."""
    body = encode(photo(64, 64, 8), "JPEG")
    odd = body.replace(b"\x03\x11\x00\x3f\x00", b"\x03\x11\x01\x00\x00", 1)
    assert odd != body
    assert np.array_equal(decode(STAGE(odd).image), decode(body))


def test_endless_segments_end() -> None:
    comments = b"\xff\xfe\x00\x02" * 200_000
    body = encode(photo(32, 32, 8), "JPEG")
    with pytest.raises(Refused, match="segments"):
        STAGE(body[:2] + comments + body[2:])


@pytest.mark.parametrize("form", FORMS)
def test_stripping_changes_no_pixel_and_is_final(form: dict[str, Any]) -> None:
    body = encode(photo(93, 71, 9), "JPEG", comment=b"C" * 500, **form)
    thumbnail = b"\xff\xe1\x00\x0cExif\0\0\xff\xda\xff\xd9"  # markers inside a segment are none
    once = Jpeg(body[:2] + thumbnail + body[2:] + b"trailer").stripped()
    assert once is not None
    assert np.array_equal(decode(once), decode(body))
    assert b"CCCC" not in once
    assert b"Exif" not in once
    assert Jpeg(once).stripped() == once


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_after_the_start_marker(tail: bytes) -> None:
    with pytest.raises(Refused):
        STAGE(b"\xff\xd8\xff" + tail)
