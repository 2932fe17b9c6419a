"""Files of texts: a line each, or a column of a table. Files of questions: texts, keys or vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from upath import UPath

from pipeline.download.lists.sources import find, read_table
from schemas.errors import NothingToDo, UsageError


def read_texts(file: str, column: str) -> list[str]:
    """The texts of a txt, csv, tsv, json, jsonl or parquet file, in order, without empty ones.

    Raises:
        UsageError: unreadable, or without the column.
        NothingToDo: no text in it.
    """
    texts: list[str] = []
    for path in find([file]):
        texts += [text.strip() for text in _column(path, column).to_pylist() if text and text.strip()]
    if not texts:
        raise NothingToDo(f"{file} holds no text")
    return texts


def read_questions(file: str, column: str, dim: int) -> list[str | None] | NDArray[Any]:
    """The questions of a file, in order, all of them: texts, keys int64 [Q], or vectors [Q, D] (mapped, of .npy).

    Args:
        file: .npy of vectors or keys; else as :func:`read_texts` reads it. A Parquet column may hold texts, keys
            (integers), or vectors: lists of D numbers, or 2*D bytes of float16 as in the table embeddings.
        dim: D.

    Raises:
        UsageError: unreadable, without the column, or vectors of another width.
        NothingToDo: no question in it.
    """
    path = UPath(file)
    if not path.is_file():
        raise UsageError(f"--queries {file}: there is no such file", expected="txt, csv, jsonl, parquet, npy")
    values = _array(path, dim) if path.suffix == ".npy" else _values(_column(path, column), f"{file}: {column}", dim)
    if not len(values):
        raise NothingToDo(f"{file} holds no question")
    return values


def _column(path: UPath, column: str) -> pa.ChunkedArray:
    table = read_table(path, [column])
    if column not in table.column_names:
        raise UsageError(f"{path} has no column {column!r}", actual="columns: " + ", ".join(table.column_names))
    return table[column]


def _array(path: UPath, dim: int) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            local = path.protocol in ("", "file")
            values = np.load(str(path) if local else file, mmap_mode="r" if local else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise UsageError(f"--queries {path} is no readable .npy file", actual=str(exc)) from exc
    if values.ndim == 1 and values.dtype.kind in "iu":
        return np.asarray(values, np.int64)
    if values.ndim != 2 or values.shape[1] != dim or values.dtype.kind != "f":
        raise _unfit(str(path), dim, f"{values.dtype} {list(values.shape)}")
    return np.asarray(values)


def _values(column: pa.ChunkedArray, where: str, dim: int) -> list[str | None] | NDArray[Any]:
    kind = column.type
    if pa.types.is_integer(kind):
        return np.asarray(column.fill_null(-1).cast(pa.int64()).to_numpy())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return [None if text is None else str(text) for text in column.to_pylist()]
    rows = column.to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_large_binary(kind):
        rows = [None if row is None else np.frombuffer(row[: len(row) // 2 * 2], "<f2") for row in rows]
    elif not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)):
        raise UsageError(f"--queries {where} holds no questions", expected="texts, keys or vectors", actual=str(kind))
    vectors = np.zeros((len(rows), dim), np.float32)
    for i, row in enumerate(rows):
        if row is not None:  # what is missing stays zero, and is told of as that
            if len(row) != dim:
                raise _unfit(where, dim, f"{len(row)} numbers in row {i}")
            vectors[i] = row
    return vectors


def _unfit(where: str, dim: int, actual: str) -> UsageError:
    return UsageError(f"--queries {where} does not fit the index", expected=f"vectors of {dim} numbers", actual=actual)
