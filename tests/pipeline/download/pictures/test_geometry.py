"""Sizes and pixels against img2dataset's own Resizer."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.download.pictures.geometry import plan
from pipeline.download.pictures.images import ImageStage
from schemas.configs import DownloadConfig
from tests.pipeline.download.pictures.pictures import decode, encode, photo, psnr, resizer_class

MODES = ("border", "keep_ratio", "keep_ratio_largest", "center_crop", "no")
sides = st.integers(1, 200)


def resizer(config: DownloadConfig) -> Any:
    return resizer_class()(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=not config.upscale,
        encode_quality=config.quality,
        encode_format=config.format,
    )


@settings(max_examples=100, deadline=None)
@given(sides, sides, st.integers(1, 96), st.sampled_from(MODES), st.booleans())
def test_every_size_is_the_resizers(width: int, height: int, side: int, mode: Any, upscale: bool) -> None:
    config = DownloadConfig(image_size=side, resize_mode=mode, upscale=upscale, format="png", quality=0)
    grey = encode(np.zeros((height, width, 3), np.uint8), "BMP")
    _, *sizes, error = resizer(config)(io.BytesIO(grey))
    assert error is None
    assert [*plan(width, height, config).final, width, height] == sizes


@pytest.mark.parametrize("upscale", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(97, 61), (61, 97), (40, 30), (64, 64), (301, 203)])
def test_lossless_pictures_have_the_resizers_pixels(mode: Any, size: tuple[int, int], upscale: bool) -> None:
    config = DownloadConfig(image_size=64, resize_mode=mode, upscale=upscale, format="png")
    body = encode(photo(*size, seed=1), "PNG")
    theirs, width, height, *_ = resizer(config)(io.BytesIO(body))
    ours = ImageStage(config)(body)
    assert (ours.width, ours.height) == (width, height)
    assert np.array_equal(decode(ours.image), decode(theirs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1024, 768), (601, 799), (1533, 1147), (257, 300), (200, 150)])
def test_jpegs_look_like_the_resizers(mode: Any, size: tuple[int, int]) -> None:
    config = DownloadConfig(resize_mode=mode, format="png", quality=0)
    body = encode(photo(*size, seed=2), "JPEG", quality=85)
    theirs, width, height, *_ = resizer(config)(io.BytesIO(body))
    ours = ImageStage(config)(body)
    assert decode(ours.image).shape == (height, width, 3)
    assert psnr(decode(ours.image), decode(theirs)) > 40


def test_thin_lines_keep_a_pixel_and_do_not_become_bombs() -> None:
    assert plan(1000, 1, DownloadConfig(resize_mode="keep_ratio_largest")).final == (256, 1)
    assert plan(1, 1000, DownloadConfig(upscale=True)).final == (256, 256_000)
