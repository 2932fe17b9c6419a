"""Vectors of a Parquet column chunk as views of its bytes: no decoder between the file and NumPy.

``pipeline.tables`` writes vectors uncompressed and without dictionary. A page is then its levels, followed by 4 bytes
of length (little-endian) and 2*D bytes of vector for each row: a strided view of it is the matrix. What is written
otherwise is left to Arrow.

Source: Apache Parquet format 2.12, parquet.thrift (PageHeader) and Encodings.md (PLAIN); Thrift compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_LENGTH = 4
"""Bytes of a value's length, before it."""
_DATA_PAGE, _DATA_PAGE_V2, _PLAIN = 0, 3, 0
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_LONGEST = 10
"""Bytes of the longest varint."""

Bytes = NDArray[np.uint8]


class NotPlain(Exception):
    """The chunk has other pages, nulls, or values of another length: Arrow has to read it."""


def plain_values(chunk: pa.Buffer, rows: int, width: int, *, nullable: bool) -> list[Bytes]:
    """The values of an uncompressed column chunk as views uint8 [n, width], page by page, ``rows`` rows together.

    Every length is checked. ``nullable``: the column has definition levels.

    Raises:
        NotPlain: it is not all PLAIN pages with a value of ``width`` bytes in every row.
    """
    stride, pages = _LENGTH + width, []
    data = np.frombuffer(chunk, np.uint8)
    for first, count in _pages(_view(chunk), rows, width, nullable):
        if not (np.ndarray((count,), "<u4", data, first, (stride,)) == width).all():
            raise NotPlain
        pages.append(np.ndarray((count, width), np.uint8, data, first + _LENGTH, (stride, 1)))
    return pages


def seems_plain(chunk: pa.Buffer, rows: int, width: int, *, nullable: bool) -> bool:
    """Whether the pages have room for exactly so many values of ``width`` bytes: no row is null. Reads headers only."""
    try:
        return sum(count for _, count in _pages(_view(chunk), rows, width, nullable)) == rows
    except NotPlain:
        return False


def _view(chunk: pa.Buffer) -> memoryview:
    return memoryview(chunk).cast("B")  # as whose bytes are never negative


def _pages(data: memoryview, rows: int, width: int, nullable: bool) -> Iterator[tuple[int, int]]:
    """Of each page where its values begin, and how many there are."""
    at = found = 0
    while found < rows:
        try:
            first, count, at = _page(data, at, width, nullable)
        except (IndexError, KeyError, TypeError) as exc:  # cut off, or no header at all
            raise NotPlain from exc
        yield first, count
        found += count
    if found != rows:
        raise NotPlain


def _page(data: memoryview, at: int, width: int, nullable: bool) -> tuple[int, int, int]:
    """Of the page whose header is at ``at``: where its values begin, how many there are, where the next header is."""
    header, start = _struct(data, at)
    size = header[3]
    if header[1] == _DATA_PAGE:
        kind = header[5]
        encoding = kind[2]
        levels = 4 + int.from_bytes(data[start : start + 4], "little") if nullable else 0
    elif header[1] == _DATA_PAGE_V2:
        kind = header[8]
        encoding, levels = kind[4], kind[5] + kind[6]
    else:
        raise NotPlain
    count = kind[1]
    if encoding != _PLAIN or count <= 0 or size != levels + count * (_LENGTH + width) or start + size > len(data):
        raise NotPlain
    return start + levels, count, start + size


def _struct(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """A Thrift struct: field id -> integer, bool or struct (texts are passed over), and where it ends.

    Raises:
        NotPlain: a field of a type that page headers do not have.
    """
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, at = _zigzag(data, at)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind in _INTEGERS:
            fields[number], at = _zigzag(data, at)
        elif kind == _STRUCT:
            fields[number], at = _struct(data, at)
        elif kind == _BINARY:
            length, at = _varint(data, at)
            at += length
        elif kind in (_BYTE, _DOUBLE):
            at += 1 if kind == _BYTE else 8
        else:
            raise NotPlain
    return fields, at + 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i in range(_LONGEST):
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise NotPlain


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
