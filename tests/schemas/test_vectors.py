"""Vectors in and out of a BINARY column."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import SchemaError
from schemas.vectors import normalise, pack, unpack


def matrix(n: int, dim: int) -> np.ndarray:
    """Every number tells its row and column: a shifted or swapped row fails."""
    return (np.arange(n)[:, None] + np.arange(dim)[None] / 64).astype(np.float16)


@given(st.integers(0, 30), st.integers(1, 9), st.data())
def test_round_trip_of_any_slice(n: int, dim: int, data: st.DataObject) -> None:
    rows = matrix(n, dim)
    start = data.draw(st.integers(0, n))
    length = data.draw(st.integers(0, n - start))
    column = pack(rows)
    assert len(column) == n
    assert all(len(value) == 2 * dim for value in column.to_pylist())
    np.testing.assert_array_equal(unpack(column.slice(start, length), dim), rows[start : start + length])


@given(st.lists(st.integers(0, 5), max_size=5))
def test_round_trip_of_chunks(sizes: list[int]) -> None:
    rows = matrix(sum(sizes), 4)
    ends = np.cumsum(sizes).tolist()
    chunks = [pack(rows[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    found = unpack(pa.chunked_array(chunks, pa.binary()), 4)
    assert found.shape == rows.shape
    np.testing.assert_array_equal(found, rows)


def test_bytes_are_little_endian_float16() -> None:
    assert pack([[1.0, -2.0]]).to_pylist() == [bytes([0x00, 0x3C, 0x00, 0xC0])]


def test_large_binary_and_a_trip_through_parquet() -> None:
    rows = matrix(7, 3)
    np.testing.assert_array_equal(unpack(pack(rows).cast(pa.large_binary()), 3), rows)
    sink = io.BytesIO()
    pq.write_table(pa.table({"v": pack(rows)}), sink, row_group_size=2)
    np.testing.assert_array_equal(unpack(pq.read_table(sink)["v"], 3), rows)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(SchemaError, match="D=4") as caught:
        unpack(pa.array([b"\0" * 8, b"\0" * 6]), 4)
    assert "6" in caught.value.actual


def test_lengths_that_only_add_up_are_refused() -> None:
    with pytest.raises(SchemaError):
        unpack(pa.array([b"\0" * 4, b"\0" * 12]), 4)


def test_another_dimension_is_refused() -> None:
    with pytest.raises(SchemaError):
        unpack(pack(matrix(3, 4)), 2)


def test_nulls_are_refused() -> None:
    with pytest.raises(SchemaError, match="1 nulls"):
        unpack(pa.array([b"\0" * 8, None]), 4)
    # A null slot may own 2*D bytes of its buffer: the length alone would let it through.
    hidden = pa.Array.from_buffers(
        pa.binary(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(np.array([0, 8, 16], np.int32)), pa.py_buffer(b"x" * 16)]
    )
    with pytest.raises(SchemaError, match="1 nulls"):
        unpack(hidden, 4)


def test_only_a_matrix_is_packed() -> None:
    with pytest.raises(SchemaError, match="matrix"):
        pack(np.zeros(4))


def test_normalise() -> None:
    found = normalise(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert found.dtype == np.float32
