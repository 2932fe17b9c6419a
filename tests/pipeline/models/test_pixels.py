"""Decoded pixels against open_clip's own preprocessing; what is damaged is named, and nothing needs torch."""

import contextlib
import io
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image

from pipeline.models.encoder import Encoder
from pipeline.models.pixels import Decoder, Undecodable
from schemas.cards import EncoderCard
from tests.pipeline.models.clips import clip_folder, encoded, picture

SIZES = [(37, 53), (33, 31), (100, 34), (20, 17)]
FILES = {
    "jpeg": lambda w, h: encoded(picture(w, h), "JPEG", quality=90),
    "jpeg 4:4:4": lambda w, h: encoded(picture(w, h), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": lambda w, h: encoded(picture(w, h), "JPEG", quality=80, progressive=True),
    "grey jpeg": lambda w, h: encoded(picture(w, h, mode="L"), "JPEG"),
    "cmyk jpeg": lambda w, h: encoded(picture(w, h, mode="CMYK"), "JPEG"),
    "png": lambda w, h: encoded(picture(w, h)),
    "rgba png": lambda w, h: encoded(picture(w, h, mode="RGBA")),
    "grey png": lambda w, h: encoded(picture(w, h, mode="L")),
    "grey png with alpha": lambda w, h: encoded(picture(w, h, mode="L").convert("LA")),
    "two-tone png": lambda w, h: encoded(picture(w, h, mode="L").convert("1")),
    "palette png": lambda w, h: encoded(picture(w, h).quantize(60)),
    "palette png with a clear colour": lambda w, h: encoded(picture(w, h).quantize(60), transparency=7),
    "gif": lambda w, h: encoded(picture(w, h).quantize(200), "GIF"),
    "webp": lambda w, h: encoded(picture(w, h), "WEBP"),
    "cmyk tiff": lambda w, h: encoded(picture(w, h, mode="CMYK"), "TIFF"),
}


def card(size: int = 32, resize_mode: str = "shortest", interpolation: str = "bicubic") -> EncoderCard:
    return EncoderCard(
        model="m", pretrained="p", weights_sha256="0" * 64, dim=4, image_size=size, mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4), interpolation=interpolation, resize_mode=resize_mode, context_length=8, dtype="float32",
    )  # fmt: skip


def open_clips(data: bytes, card: EncoderCard) -> NDArray[np.uint8]:
    """What open_clip's preprocessing gives, without the normalisation."""
    transform = image_transform(
        card.image_size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1),
        resize_mode=card.resize_mode, interpolation=card.interpolation,
    )  # fmt: skip
    tensor = transform(Image.open(io.BytesIO(data)))
    return (tensor * 255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_open_clips(kind: str) -> None:
    for size in SIZES:
        data = FILES[kind](*size)
        for mode, filter in itertools.product(("shortest", "longest", "squash"), ("bicubic", "bilinear")):
            of = card(32, mode, filter)
            ours = Decoder(of)(data)
            assert ours.dtype == np.uint8
            assert ours.flags.c_contiguous
            np.testing.assert_array_equal(ours, open_clips(data, of), err_msg=f"{size} {mode} {filter}")


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), side=st.sampled_from([1, 7, 16, 32]),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
)  # fmt: skip
def test_any_size_is_open_clips_or_is_refused_by_both(width: int, height: int, side: int, mode: str) -> None:
    data, of = encoded(picture(width, height)), card(side, mode)
    try:
        theirs = open_clips(data, of)
    except ValueError:  # a side scaled to nothing
        with pytest.raises(Undecodable):
            Decoder(of)(data)
    else:
        np.testing.assert_array_equal(Decoder(of)(data), theirs)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(640, 480), (257, 600), (517, 519)])
def test_large_jpegs_are_scaled_while_decoding_and_stay_the_same_picture(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    encoder = Encoder(f"local-dir:{clip_folder(tmp_path, {'embed_dim': 32, 'vision_cfg': vision, 'text_cfg': text})}")
    data = encoded(picture(*size, mode=mode), "JPEG", quality=90)
    ours, theirs = encoder.decode(data), open_clips(data, encoder.card)
    assert (ours != theirs).any()  # else nothing was scaled, and this test says nothing
    a, b = encoder.encode(np.stack([ours, theirs]))
    assert float(a @ b) > 1 - 1e-4


def test_scaling_begins_at_four_times_the_side() -> None:
    below, above = (encoded(picture(n, n + 9), "JPEG") for n in (127, 128))
    np.testing.assert_array_equal(Decoder(card(32))(below), open_clips(below, card(32)))
    assert (Decoder(card(32))(above) != open_clips(above, card(32))).any()


@pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "cmyk jpeg", "png", "palette png", "gif", "webp"])
def test_damage_is_undecodable(kind: str) -> None:
    whole, decoder = FILES[kind](60, 127), Decoder(card())
    for keep in (0, 1, 10, len(whole) // 4, len(whole) // 2):
        with pytest.raises(Undecodable):
            decoder(whole[:keep])


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["jpeg", "cmyk jpeg", "png", "gif", "webp"]), data=st.data())
def test_flipped_bytes_give_a_picture_or_undecodable(kind: str, data: Any) -> None:
    broken = bytearray(FILES[kind](33, 31))
    for at in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=8)):
        broken[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Undecodable):
        assert Decoder(card())(bytes(broken)).shape == (3, 32, 32)


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + b"\0" * 40, b"GIF89a"])
def test_no_picture_is_undecodable_to_both_families_of_errors(data: bytes) -> None:
    with pytest.raises(Undecodable):
        Decoder(card())(data)
    assert issubclass(Undecodable, ValueError)
    assert issubclass(Undecodable, OSError)  # what Pillow raises, and callers catch


def test_decoder_and_its_error_travel_between_processes() -> None:
    data = FILES["jpeg"](60, 127)
    there = pickle.loads(pickle.dumps(Decoder(card(16, "longest"))))
    np.testing.assert_array_equal(there(data), Decoder(card(16, "longest"))(data))
    assert str(pickle.loads(pickle.dumps(Undecodable("OSError: broken")))) == "OSError: broken"


def test_decoding_needs_no_torch() -> None:
    code = "import sys, pipeline.models.pixels; assert not {'torch', 'open_clip', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
