"""Arrays beside an index: they come back as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from pipeline.index.arrays import load_arrays, save_arrays
from schemas.errors import CardError

ARRAYS = {"keys": np.array([7, 2**62]), "similarity": np.array([[0.5, -np.inf]], np.float32), "none": np.empty((0, 3))}


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    path = UPath(tmp_path) / "new" / "a.npz"
    digest = save_arrays(path, ARRAYS)
    for found in (load_arrays(path), load_arrays(path, digest)):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert save_arrays(path, dict(reversed(ARRAYS.items()))) == digest, "in whatever order they are given"


def test_what_was_not_written_there(tmp_path: Path) -> None:
    path = UPath(tmp_path) / "a.npz"
    with pytest.raises(CardError, match="rebuild"):
        load_arrays(path)
    first = save_arrays(path, ARRAYS)
    second = save_arrays(path, ARRAYS | {"keys": np.array([7, 2**62 + 1])})
    assert first != second
    with pytest.raises(CardError, match="another digest"):
        load_arrays(path, first)
    data = bytearray(path.read_bytes())
    data[data.find(np.array([7, 2**62 + 1]).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(CardError):
        load_arrays(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CardError):
        load_arrays(path, second)
