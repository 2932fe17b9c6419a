"""The metadata beside vectors -> the pairs that they are of, whoever named its columns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import UsageError
from schemas.keys import pair_keys

_URL, _CAPTION, _NAME = ("url",), ("caption", "text"), ("image_path", "key", "sample_id")
_KEY = "pair_key"
METADATA = ("image_path", "caption", "url", _KEY, "similarity", "width", "height", "original_width", "original_height",
            "sha256")  # fmt: skip
"""Columns that our own export writes: clip-retrieval's names, where it has one."""
_DROPPED = frozenset(("image_path", "key", "status", "error_message", "__index_level_0__"))


@dataclass(frozen=True)
class Described:
    """A stretch's rows. ``captions``: None where one is not UTF-8. ``extras``: JSON objects, or None.

    ``similarity`` and ``sha256`` are null but in our own export: of which encoder and image they are elsewhere, the
    metadata does not say. ``other_keys``: rows with a key that is not of their URL and caption.
    """

    keys: NDArray[np.int64]
    urls: list[str]
    captions: list[str | None]
    extras: list[str | None]
    similarity: pa.Array
    sha256: pa.Array
    other_keys: int


def describe(rows: pa.Table, folder: str, file: str, first: int) -> Described:
    """The pairs of a stretch of the metadata in ``file``, from its row ``first`` on.

    A row without URL gets its image's path for one; a relative one, which is unique only there, after the folder.

    Raises:
        UsageError: no column tells whose the vectors are.
    """
    names = {name.casefold(): name for name in reversed(rows.column_names)}
    url, caption, path = (_first(rows, names, known) for known in (_URL, _CAPTION, _NAME))
    if url is None and path is None:
        raise UsageError(
            f"{file} does not tell whose the vectors are",
            expected="a column url, image_path or key",
            actual="columns: " + ", ".join(rows.column_names),
        )
    empty = [""] * rows.num_rows
    captions: list[str | None] = [*empty]
    if caption is not None:
        captions = [text if valid else None for text, valid in _texts(caption)]
    paths = empty if path is None else [text for text, _ in _texts(path)]
    named = empty if url is None else [text for text, _ in _texts(url)]
    places = (_located(p, folder) if p else f"{file}#{first + i}" for i, p in enumerate(paths))
    urls = [u or place for u, place in zip(named, places, strict=True)]
    keys = pair_keys(urls, [c or "" for c in captions])
    own = _KEY in rows.column_names and pa.types.is_integer(rows.schema.field(_KEY).type)
    kept = keys
    if own:
        given = pc.fill_null(rows[_KEY].cast(pa.int64()), -1).to_numpy()
        kept = np.where(given >= 0, given, keys)
    used = {names[n] for known in (_URL, _CAPTION) for n in known if n in names} | _DROPPED
    extras = _extras(rows, used | set(METADATA) if own else used)
    n = rows.num_rows
    similarity = _column(rows, "similarity", pa.float32()) if own else pa.nulls(n, pa.float32())
    sha256 = _column(rows, "sha256", pa.string()) if own else pa.nulls(n, pa.string())
    return Described(kept, urls, captions, extras, similarity, sha256, int((kept != keys).sum()))


def _first(rows: pa.Table, names: dict[str, str], known: Iterable[str]) -> pa.ChunkedArray | None:
    return next((rows[names[name]] for name in known if name in names), None)


def _column(rows: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    found = rows[name].cast(kind) if name in rows.column_names else pa.nulls(rows.num_rows, kind)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _texts(column: pa.ChunkedArray) -> Iterable[tuple[str, bool]]:
    """Each value as text, empty for null, and whether it is UTF-8 (or no text at all)."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.string())
    for value in column.cast(pa.large_binary()).to_pylist():
        try:
            yield (value or b"").decode(), True
        except UnicodeDecodeError:
            yield value.decode(errors="replace"), False


def _located(path: str, folder: str) -> str:
    return path if path.startswith("/") or "://" in path else f"{folder}#{path}"


def _extras(rows: pa.Table, used: Iterable[str]) -> list[str | None]:
    """The other columns of each row as a JSON object."""
    names = [name for name in rows.column_names if name not in set(used)]
    if not names:
        return [None] * rows.num_rows
    columns = [_values(rows[name]) for name in names]
    described = ({n: v for n, v in zip(names, row, strict=True) if v is not None} for row in zip(*columns, strict=True))
    return [json.dumps(some, default=str, ensure_ascii=False) if some else None for some in described]


def _values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        valid = column.is_valid().to_pylist()
        return [text if there else None for (text, _), there in zip(_texts(column), valid, strict=True)]
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(column.type):
        return [v if v is None or np.isfinite(v) else None for v in values]
    return values
