"""Bytes -> stored image: colours, orientation, kept originals, metadata, limits, and nothing but Refused."""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from pydantic import ValidationError

from pipeline.download.pictures import images, raster
from pipeline.download.pictures.images import ImageStage, Stored
from pipeline.download.web.policy import Refused
from schemas.configs import DownloadConfig
from schemas.errors import Reason
from tests.pipeline.download.pictures.pictures import Pixels, blocks, decode, encode, photo, psnr

PNG = DownloadConfig(format="png")
"""Lossless, so that what is stored can be compared pixel by pixel."""

FIVE = [
    ("JPEG", {"quality": 100, "subsampling": 0}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("AVIF", {"quality": 100}),
]


def refusal(body: bytes, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        ImageStage(DownloadConfig(**fields))(body)
    return caught.value


def stored(body: bytes, config: DownloadConfig = PNG) -> Pixels:
    return decode(ImageStage(config)(body).image)


def near(a: Pixels, b: Pixels, levels: int) -> bool:
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= levels


# --- formats and colours


@pytest.mark.parametrize(
    ("kind", "options", "levels"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 100}, 12),
        ("GIF", {}, 0),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}, 3),
        ("JPEG", {"quality": 100, "keep_rgb": True}, 3),
    ],
)
@pytest.mark.parametrize("target", ["png", "webp", "jpg"])
def test_every_format_comes_out_as_it_was(kind: str, options: dict[str, Any], levels: int, target: Any) -> None:
    result = ImageStage(DownloadConfig(format=target, quality=9 if target == "png" else 100))(
        encode(blocks(), kind, **options)
    )
    assert (result.format, result.original_format) == (target, kind.lower())
    assert (result.width, result.height, result.original_width, result.original_height) == (48, 32, 48, 32)
    pixels, inside = decode(result.image), np.s_[4::16, 4::16]  # blocks' insides: chroma blurs the edges
    assert near(pixels[inside], blocks()[inside], levels + (0 if target == "png" else 6))


def test_grey_palette_and_one_bit() -> None:
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (20, 1))
    three = np.repeat(grey[:, :, None], 3, axis=2)
    for kind in ("PNG", "TIFF", "GIF", "BMP"):
        assert np.array_equal(stored(encode(grey, kind)), three)
    assert near(stored(encode(grey, "JPEG", quality=100)), three, 2)
    palette = Image.fromarray(blocks()).quantize(6)
    assert np.array_equal(stored(encode(palette, "PNG")), blocks())
    bits = grey > 100
    assert np.array_equal(stored(encode(Image.fromarray(bits), "PNG")), np.where(bits, 255, 0)[:, :, None].repeat(3, 2))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (20, 1))
    expected = np.round(deep / 257).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(stored(encode(Image.fromarray(deep), kind)), expected)
    colour = np.stack([deep, deep[:, ::-1], np.full_like(deep, 40_000)], axis=2)
    png = cv2.imencode(".png", colour[:, :, ::-1])[1].tobytes()
    assert near(stored(png), np.round(colour / 257).astype(np.uint8), 1)


def over_white(rgba: np.ndarray) -> Pixels:
    alpha = rgba[:, :, 3:].astype(float) / 255
    return np.rint(alpha * rgba[:, :, :3] + (1 - alpha) * 255).astype(np.uint8)


def test_transparency_is_laid_over_white() -> None:
    alpha = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    rgba = np.dstack([blocks(), alpha])
    assert near(stored(encode(rgba, "PNG")), over_white(rgba), 1)
    assert near(stored(encode(rgba, "WEBP", lossless=True, exact=True)), over_white(rgba), 1)
    assert near(stored(encode(rgba, "TIFF")), over_white(rgba), 1)
    grey = np.dstack([blocks()[:, :, 0], alpha])
    expected = over_white(np.dstack([grey[:, :, :1].repeat(3, axis=2), alpha]))
    assert near(stored(encode(Image.fromarray(grey, "LA"), "PNG")), expected, 1)


def test_transparent_palettes_and_keys() -> None:
    palette = Image.fromarray(blocks()).quantize(6)
    index = palette.getpixel((20, 4))  # the second block
    expected = blocks()
    expected[:16, 16:32] = 255
    assert np.array_equal(stored(encode(palette, "PNG", transparency=index)), expected)
    assert np.array_equal(stored(encode(palette, "GIF", transparency=index)), expected)
    assert np.array_equal(stored(encode(blocks(), "PNG", transparency=(40, 180, 60))), expected)


@pytest.mark.parametrize("profile", [False, True])
def test_cmyk_jpegs_as_adobe_writes_them(profile: bool) -> None:
    """Colours of ink by hand: R = 255 (1 - C) (1 - K). Adobe stores them upside down, Pillow writes them so, too."""
    rgb = blocks()
    ink = 255 - rgb.max(axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        cmy = 255 * (1 - rgb / np.maximum(rgb.max(axis=2, keepdims=True), 1))
    cmyk = np.dstack([np.rint(cmy), ink]).astype(np.uint8)
    body = encode(
        Image.fromarray(cmyk, "CMYK"),
        "JPEG",
        quality=100,
        subsampling=0,
        **({"icc_profile": b"junk"} if profile else {}),
    )
    assert near(stored(body)[4::8, 4::8], rgb[4::8, 4::8], 4)
    assert near(stored(encode(Image.fromarray(cmyk, "CMYK"), "TIFF")), rgb, 3)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100}),
    ],
)
def test_exif_orientation(turn: int, kind: str, options: dict[str, Any]) -> None:
    """The stored rows and columns, by the EXIF standard's table of where row 0 and column 0 are seen."""
    seen = blocks()
    rows_first = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1]}
    swapped = seen.transpose(1, 0, 2)
    columns_first = {5: swapped, 6: swapped[::-1], 7: swapped[::-1, ::-1], 8: swapped[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = turn
    as_stored = np.ascontiguousarray((rows_first | columns_first)[turn])
    body = encode(as_stored, kind, exif=exif.tobytes(), **options)
    result = ImageStage(PNG)(body)
    assert (result.original_width, result.original_height) == (48, 32)
    assert near(decode(result.image)[4::16, 4::16], seen[4::16, 4::16], 6)
    with Image.open(io.BytesIO(result.image)) as image:
        assert not image.getexif()


def test_orientation_and_resizing_go_together() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = photo(400, 300, 1)
    body = encode(np.rot90(picture), "JPEG", quality=95, exif=exif.tobytes())
    for mode in ("keep_ratio", "center_crop", "border"):
        config = DownloadConfig(resize_mode=mode, image_size=100, format="png")
        turned, plain = ImageStage(config)(body), ImageStage(config)(encode(picture, "JPEG", quality=95))
        assert (turned.width, turned.height) == (plain.width, plain.height)
        assert psnr(decode(turned.image), decode(plain.image)) > 33
        assert turned.phash == plain.phash


# --- profiles: a display with red and green swapped is told from sRGB by eye


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries have changed places."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = srgb.index(b"rXYZ", 128), srgb.index(b"gXYZ", 128)
    srgb[red : red + 4], srgb[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(srgb)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100}),
    ],
)
def test_profiles_are_applied_and_dropped(kind: str, options: dict[str, Any]) -> None:
    body = encode(blocks(), kind, icc_profile=swapped_profile(), **options)
    for target in ("png", "jpg", "webp"):
        result = ImageStage(DownloadConfig(format=target, quality=9 if target == "png" else 100))(body)
        expected = blocks()[:, :, [1, 0, 2]]
        assert near(decode(result.image)[4::16, 4::16], expected[4::16, 4::16], 10)
        with Image.open(io.BytesIO(result.image)) as image:
            assert "icc_profile" not in image.info


def test_adobe_rgb_against_the_mathematics() -> None:
    """Adobe RGB (1998): gamma 2.2, its own green. Matrices to XYZ (D50) and from it to linear sRGB, by the books."""
    to_xyz = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    from_xyz = np.array([[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]])
    pixels = np.array([[[120, 130, 110], [180, 160, 150], [90, 100, 140], [128, 128, 128]]], np.uint8).repeat(8, 0)
    linear = (pixels / 255) ** (563 / 256) @ to_xyz.T @ from_xyz.T
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.clip(linear, 0, 1) ** (1 / 2.4) - 0.055)
    body = encode(pixels, "PNG", icc_profile=matrix_profile(to_xyz, 563))
    assert near(stored(body), np.rint(encoded * 255).astype(np.uint8), 2)


def matrix_profile(to_xyz: np.ndarray, gamma: int) -> bytes:
    """A display profile, version 2: primaries as columns of ``to_xyz``, gamma in 256ths."""

    def number(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def xyz(column: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(number(v) for v in column)

    curve = b"curv\0\0\0\0\0\0\0\1" + gamma.to_bytes(2, "big") + b"\0\0"
    name = b"desc\0\0\0\0\0\0\0\5test\0" + b"\0" * 79
    tags = [(b"desc", name), (b"wtpt", xyz(np.array([0.9642, 1, 0.8249])))]
    tags += [(b"rXYZ", xyz(to_xyz[:, 0])), (b"gXYZ", xyz(to_xyz[:, 1])), (b"bXYZ", xyz(to_xyz[:, 2]))]
    tags += [(b"rTRC", curve), (b"gTRC", curve), (b"bTRC", curve)]
    table, data, at = b"", b"", 132 + 12 * len(tags)
    for tag, content in tags:
        table += tag + (at + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content
    head = (at + len(data)).to_bytes(4, "big") + b"lcms\x02\x10\0\0mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    white = number(0.9642) + number(1) + number(0.8249)
    return (head + white).ljust(128, b"\0") + len(tags).to_bytes(4, "big") + table + data


def black_ink_profile() -> bytes:
    """A printer, version 2, whose black alone is seen: L* = 100 - 100 K; the other inks leave the paper white."""

    def tag(content: bytes) -> bytes:
        return content + b"\0" * (-len(content) % 4)

    unity = bytes(range(256))
    corners = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))  # K varies fastest; Lab
    matrix = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table = tag(b"mft1\0\0\0\0\4\3\2\0" + matrix + 4 * unity + corners + 3 * unity)
    name = tag(b"desc\0\0\0\0\0\0\0\5test\0" + b"\0" * 79)
    index, at = b"", 132 + 12 * 2
    for kind, content in ((b"desc", name), (b"A2B0", table)):
        index += kind + struct.pack(">II", at, len(content))
        at += len(content)
    white = struct.pack(">iii", *(round(65536 * v) for v in (0.9642, 1, 0.8249)))
    head = struct.pack(">I", at) + b"lcms\x02\x10\0\0prtrCMYKLab " + b"\0" * 12 + b"acsp" + b"\0" * 28 + white
    return head.ljust(128, b"\0") + struct.pack(">I", 2) + index + name + table


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile_of_its_own(kind: str) -> None:
    black = np.repeat(np.array([0, 51, 128, 204, 255], np.uint8), 16)
    ramp = np.tile(black, (16, 1))
    cmyk = np.dstack([np.full_like(ramp, 200), np.full_like(ramp, 30), np.full_like(ramp, 90), ramp])
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    body = encode(Image.fromarray(cmyk, "CMYK"), kind, icc_profile=black_ink_profile(), **options)
    lightness = 100 - 100 * (ramp / 255)
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    grey = 255 * np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)
    expected = np.rint(grey).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    assert near(stored(body)[:, 8::16], expected[:, 8::16], 4)


def test_srgb_by_any_name_and_broken_profiles_change_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, b"junk", srgb[:200], lab):
        assert np.array_equal(stored(encode(blocks(), "PNG", icc_profile=profile)), blocks())
    body = encode(photo(64, 64, 1), "JPEG", icc_profile=srgb)
    kept = ImageStage(DownloadConfig())(body)
    assert np.array_equal(decode(kept.image), decode(body))  # even the bytes of the pixels are kept


# --- animations


def frames(number: int) -> list[Image.Image]:
    return [Image.fromarray(np.roll(blocks(), 7 * i, axis=1)) for i in range(number)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GIF", {}), *FIVE[1:]],
)
def test_the_first_frame_is_stored_and_frames_are_limited(kind: str, options: dict[str, Any]) -> None:
    first, *others = frames(5)
    body = encode(first, kind, save_all=True, append_images=others, **options)
    result = ImageStage(DownloadConfig(format="png", max_frames=5))(body)
    assert near(decode(result.image)[4::16, 4::16], blocks()[4::16, 4::16], 6)
    with Image.open(io.BytesIO(result.image)) as image:
        assert getattr(image, "n_frames", 1) == 1
    assert refusal(body, max_frames=4).reason is Reason.TOO_MANY_FRAMES


# --- kept originals


def secrets() -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x010E] = "SECRET-description"
    exif[0x0112] = 1
    return {"exif": exif.tobytes()}


@pytest.mark.parametrize(
    ("kind", "target", "options"),
    [
        ("JPEG", "jpg", {"quality": 85, "comment": b"SECRET", "xmp": b"<x>SECRET</x>"}),
        ("JPEG", "jpg", {"quality": 85, "comment": b"SECRET", "progressive": True}),
        ("JPEG", "jpg", {"quality": 85, "keep_rgb": True, "comment": b"SECRET"}),
        ("JPEG", "jpg", {"quality": 85, "restart_marker_rows": 1, "comment": b"SECRET"}),
        ("PNG", "png", {}),
        ("WEBP", "webp", {"quality": 80, "xmp": b"<x>SECRET</x>"}),
        ("WEBP", "webp", {"lossless": True}),
    ],
)
def test_what_fits_is_kept_without_metadata(kind: str, target: Any, options: dict[str, Any]) -> None:
    body = encode(photo(200, 150, 3), kind, **options, **secrets()) + b"SECRET trailer"
    assert b"SECRET" in body
    keep, again = (DownloadConfig(format=target, keep_original=k) for k in (True, False))
    result = ImageStage(keep)(body)
    assert b"SECRET" not in result.image
    assert np.array_equal(decode(result.image), decode(body))
    assert len(result.image) < len(body)
    assert result.sha256 == hashlib.sha256(body).hexdigest()
    other = ImageStage(again)(body)
    assert (other.width, other.height) == (result.width, result.height) == (200, 150)
    assert ((other.phash ^ result.phash) & (2**64 - 1)).bit_count() <= 2
    with Image.open(io.BytesIO(result.image)) as image:
        assert not {"exif", "xmp", "comment", "icc_profile"} & image.info.keys()


def test_what_does_not_fit_is_made_anew() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = photo(64, 48, 5)
    grey = encode(plain[:, :, 0], "JPEG")
    for body in (grey, encode(plain, "JPEG", exif=exif.tobytes()), encode(photo(300, 300, 1), "JPEG")):
        with Image.open(io.BytesIO(ImageStage(DownloadConfig())(body).image)) as image:
            assert image.mode == "RGB"
            assert max(image.size) <= 256
    png = encode(np.dstack([plain, plain[:, :, 0]]), "PNG")
    with Image.open(io.BytesIO(ImageStage(PNG)(png).image)) as image:
        assert image.mode == "RGB"


def test_bytes_hidden_in_a_jpeg_are_not_kept() -> None:
    body = encode(photo(64, 64, 6), "JPEG")
    fat = body[:-2] + b"hidden" * 50_000 + b"\xff\xd9"
    try:
        assert b"hiddenhidden" not in ImageStage(DownloadConfig())(fat).image
    except Refused as refused:
        assert refused.reason is Reason.DECODE


# --- limits and refusals


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_limits_are_judged_by_the_header(kind: str) -> None:
    body = encode(photo(120, 40, 1), kind)
    assert refusal(body, max_pixels=4799).reason is Reason.TOO_MANY_PIXELS
    assert refusal(body, min_image_size=41).reason is Reason.TOO_SMALL
    assert refusal(body, max_aspect_ratio=2.9).reason is Reason.ASPECT_RATIO
    assert refusal(body, formats="jpeg" if kind != "JPEG" else "png").reason is Reason.FORMAT_REFUSED
    fits = DownloadConfig(max_pixels=4800, min_image_size=40, max_aspect_ratio=3)
    assert ImageStage(fits)(body).original_width == 120


def test_our_own_bomb_is_refused() -> None:
    line = encode(np.zeros((1, 5000, 3), np.uint8), "PNG")
    assert refusal(line, upscale=True, max_pixels=10**8).reason is Reason.TOO_MANY_PIXELS
    wide = encode(np.zeros((4, 20_000, 3), np.uint8), "PNG")
    assert refusal(wide, resize_mode="no", format="webp").reason is Reason.TOO_MANY_PIXELS


def test_unknown_formats_in_the_config() -> None:
    with pytest.raises(ValidationError, match="heic"):
        DownloadConfig.model_validate({"formats": ["jpeg", "heic"]})


def test_threads_get_what_one_gets() -> None:
    stage = ImageStage(DownloadConfig())
    bodies = [encode(photo(300 + 20 * i, 280, i), "JPEG", icc_profile=swapped_profile()) for i in range(6)]
    alone, together = [stage(b) for b in bodies], dict[int, list[Stored]]()

    def work(number: int) -> None:
        together[number] = [stage(b) for b in bodies]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(together[n] == alone for n in range(4))


# --- whatever the bytes are


def valid_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(photo(60, 44, 1))
    told: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": icc}
    moving: dict[str, Any] = {"save_all": True, "append_images": [picture.rotate(90)]}
    return [
        encode(picture, "JPEG", **told),
        encode(picture, "JPEG", progressive=True),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "PNG", **told),
        encode(picture.quantize(16), "PNG", **moving),
        encode(picture, "WEBP", **told),
        encode(picture.convert("RGBA"), "WEBP", **moving),
        encode(picture, "GIF", **moving),
        encode(picture, "BMP"),
        encode(picture, "TIFF", compression="tiff_lzw", **told),
        encode(picture, "AVIF", **told),
    ]


VALID = valid_files()
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=6), st.integers(0, 6)), max_size=4)
STAGES = [
    ImageStage(DownloadConfig(format=f, quality=5, image_size=32, resize_mode=m, max_pixels=10**6))
    for f, m in (("jpg", "keep_ratio"), ("jpg", "no"), ("png", "border"), ("webp", "no"))
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(VALID), edits, st.floats(0.5, 1), st.booleans(), st.sampled_from(STAGES))
def test_any_bytes_end_as_a_readable_image_or_refused(
    body: bytes, changes: list[tuple[float, bytes, int]], share: float, early: bool, stage: ImageStage
) -> None:
    reach = min(len(body), 400) if early else len(body)  # headers are where parsers are
    for where, new, removed in changes:
        at = int(where * reach)
        body = body[:at] + new + body[at + removed :]
    body = body[: int(len(body) * share)] if share < 0.9 else body
    try:
        result = stage(body)
    except Refused:
        return
    assert decode(result.image).shape == (result.height, result.width, 3)
    assert -(2**63) <= result.phash < 2**63


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp"])
def test_every_truncation_is_refused(kind: str, target: Any) -> None:
    body = encode(photo(60, 44, 2), kind)
    config = {"format": target, "quality": 5}
    assert ImageStage(DownloadConfig(**config))(body).width == 60
    for share in (0.15, 0.4, 0.7, 0.95):
        assert refusal(body[: int(len(body) * share)], **config).reason is Reason.DECODE


def test_a_png_with_a_wrong_checksum() -> None:
    body = bytearray(encode(photo(60, 44, 2), "PNG"))
    body[len(body) // 2] ^= 1
    assert refusal(bytes(body)).reason is Reason.DECODE


def test_text_bombs_are_left_out_before_decoding() -> None:
    body = encode(blocks(), "PNG")
    packed = zlib.compress(bytes(50 << 20))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bombs = (
        chunk(b"zTXt", b"a\0\0" + packed) + chunk(b"iCCP", b"a\0\0" + packed) + chunk(b"tEXt", b"a\0" + bytes(9 << 20))
    )
    assert np.array_equal(stored(body[:33] + bombs + body[33:]), blocks())
    with pytest.raises(Refused, match="chunks"):
        ImageStage(PNG)(body[:33] + chunk(b"tEXt", b"") * 30_000 + body[33:])


def test_tiffs_without_end() -> None:
    body = bytearray(encode(blocks(), "TIFF"))
    (first,) = struct.unpack_from("<I", body, 4)
    (tags,) = struct.unpack_from("<H", body, first)
    struct.pack_into("<I", body, first + 2 + 12 * tags, first)  # the page after the first is the first
    assert refusal(bytes(body)).reason is Reason.TOO_MANY_FRAMES
    struct.pack_into("<H", body, first, 60_000)
    assert refusal(bytes(body) + bytes(720_000)).reason is Reason.DECODE


def test_strips_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are flattened strip by strip: here by five rows, of 32."""
    palette = Image.fromarray(blocks()).quantize(6)
    rgba = np.dstack([blocks(), np.tile(np.arange(0, 240, 5, dtype=np.uint8), (32, 1))])
    deep = Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40)
    bodies = [encode(picture, "PNG") for picture in (blocks(), rgba, palette, blocks()[:, :, 0], deep)]
    bodies.append(encode(palette, "PNG", transparency=palette.getpixel((20, 4))))
    whole = [stored(body) for body in bodies]
    monkeypatch.setattr(raster, "_STRIP", 5 * 48)
    assert all(np.array_equal(stored(body), one) for body, one in zip(bodies, whole, strict=True))


def test_many_large_ones_at_once() -> None:
    """Decoded one after another, beside small ones: no deadlock, and all come out."""
    stage = ImageStage(DownloadConfig(image_size=16))
    large = encode(np.full((4100, 4100, 3), 90, np.uint8), "PNG", compress_level=1)
    small = encode(blocks(), "PNG")
    assert images._LARGE < 4100 * 4100
    with ThreadPoolExecutor(4) as pool:
        sizes = [r.original_width for r in pool.map(stage, [large, small, large, small])]
    assert sizes == [4100, 48, 4100, 48]
    assert not images._ONE_LARGE.locked()
