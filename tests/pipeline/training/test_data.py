"""Pictures, the held-out split, and the tables read by key."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.training import data
from pipeline.training.data import Pictures, held_out, to_input


def encoded(seed: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_pictures_are_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [encoded(i, (8, 8)) for i in range(4)]
    column = pa.chunked_array([pa.array(files, pa.binary())])
    expected = np.stack([np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in files])
    rows = np.array([2, 0])
    np.testing.assert_array_equal(Pictures(column, 8)[rows].numpy(), expected[rows])
    monkeypatch.setattr(data, "_IN_MEMORY", 0)  # decoded when asked
    np.testing.assert_array_equal(Pictures(column, 8)[rows].numpy(), expected[rows])


def test_other_sizes_become_the_middle_square() -> None:
    column = pa.chunked_array([pa.array([encoded(1, (16, 8))], pa.binary())])
    whole = np.asarray(Image.open(io.BytesIO(column[0].as_py())))
    np.testing.assert_array_equal(Pictures(column, 8)[np.array([0])][0].numpy(), whole[:, 4:12].transpose(2, 0, 1))


def test_held_out_is_a_function_of_the_key() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63 - 1, 100_000)
    apart = held_out(keys, 0.03)
    assert 0.027 < apart.mean() < 0.033
    np.testing.assert_array_equal(held_out(keys[::-1], 0.03)[::-1], apart)
    assert (held_out(keys, 0.01) <= apart).all()  # a smaller share is a part of a larger one
    assert not held_out(keys, 0.0).any()


def test_input_range() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert to_input(pixels).tolist() == [-1.0, 1.0]
