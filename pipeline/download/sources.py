"""Read lists of pairs: files, directories and globs of parquet, csv, tsv, json, jsonl and txt."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from upath import UPath

from schemas.errors import UsageError
from schemas.keys import pair_keys

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")
_PACKED = {".gz": "gzip", ".zst": "zstd"}


def find(patterns: Sequence[str]) -> list[UPath]:
    """The files that ``patterns`` name, sorted, each once.

    Raises:
        UsageError: a pattern finds nothing, or a file is of no known format.
    """
    files: dict[str, UPath] = {}
    for pattern in patterns:
        hits = list(_expand(pattern))
        if not hits:
            raise UsageError(
                f"--pairs {pattern}: nothing found",
                expected="a file, directory or glob of " + ", ".join(FORMATS) + " (plain, .gz or .zst)",
                remedy="check the path",
            )
        files |= {str(hit): hit for hit in hits}
    return [files[name] for name in sorted(files)]


def _expand(pattern: str) -> Iterator[UPath]:
    path = UPath(pattern)
    if path.is_dir():
        yield from (p for p in path.rglob("*") if p.is_file() and _format(p.name)[0] in FORMATS)
    elif path.is_file():
        yield path
    elif path.protocol in ("", "file"):
        # "**" matches folders, too, and even one that is not there.
        hits = map(UPath, glob.glob(pattern, recursive=True))  # noqa: PTH207
        yield from (hit for hit in hits if hit.is_file())
    else:
        fs = path.fs
        yield from (UPath(fs.unstrip_protocol(hit)) for hit in fs.glob(path.path))


def _format(name: str) -> tuple[str, str | None]:
    """("csv", "gzip") of "a.csv.gz"."""
    path = PurePosixPath(name.lower())
    packed = _PACKED.get(path.suffix)
    kind = PurePosixPath(path.stem).suffix if packed else path.suffix
    return {".ndjson": "jsonl"}.get(kind, kind).lstrip("."), packed


def read_pairs(file: UPath, url_col: str, caption_col: str) -> pa.Table:
    """A file's pairs as (pair_key, url, caption, source); a missing caption is the empty string.

    Raises:
        UsageError: unknown format, unreadable, or without the named columns (it names those there are).
    """
    table = read_table(file, [url_col, caption_col])
    missing = [c for c in (url_col, caption_col) if c not in table.column_names]
    if missing:
        raise UsageError(
            f"{file} has no column {' and no column '.join(map(repr, missing))}",
            actual="columns: " + ", ".join(table.column_names),
            remedy="name them with --url-col and --caption-col",
        )
    urls, captions = _texts(file, table, url_col), _texts(file, table, caption_col)
    keys = pair_keys(urls.to_pylist(), captions.to_pylist())
    source = pa.array([str(file)] * len(keys), pa.string())
    return pa.table({"pair_key": keys, "url": urls, "caption": captions, "source": source})


def _texts(file: UPath, table: pa.Table, column: str) -> pa.ChunkedArray:
    try:
        return pc.fill_null(table[column].cast(pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as exc:  # KeyError: there are two of that name
        raise UsageError(
            f"{file}: the column {column!r} is not a column of text",
            expected="one column of strings",
            actual=", ".join(str(f) for f in table.schema if f.name == column),
            remedy="name another with --url-col or --caption-col",
        ) from exc


def read_table(file: UPath, columns: Sequence[str]) -> pa.Table:
    """A file's columns as Arrow. A line of txt is the first column, and the others are empty.

    Raises:
        UsageError: unknown format, or unreadable. (Columns that are not there are the caller's to name.)
    """
    kind, packed = _format(file.name)
    if kind not in FORMATS:
        raise UsageError(f"{file}: unknown format", expected=", ".join(FORMATS), actual=kind or "no suffix")
    try:
        with file.open("rb") as raw:
            stream: Any = pa.CompressedInputStream(raw, packed) if packed else raw
            return _read(stream, kind, columns)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise UsageError(f"{file} is not a readable {kind} file", actual=str(exc).partition("\n")[0]) from exc


def _read(stream: IO[bytes], kind: str, columns: Sequence[str]) -> pa.Table:
    if kind == "parquet":
        reader = pq.ParquetFile(pa.BufferReader(stream.read()))
        # Without one of the columns, the names alone are needed, for the message.
        there = set(columns) <= set(reader.schema_arrow.names)
        return reader.read(columns=list(columns)) if there else reader.schema_arrow.empty_table()
    if kind in ("csv", "tsv"):
        return pyarrow.csv.read_csv(
            stream,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True),
            # Strings are never null: "NA", "null" and "None" are captions like any other.
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
    data = stream.read()
    if kind == "txt":
        lines = [line.strip() for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        empty = [""] * len(lines)
        return pa.table({name: pa.array(empty if i else lines, pa.string()) for i, name in enumerate(columns)})
    if kind == "json" and data.lstrip()[:1] == b"[":
        rows = json.loads(data)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("not every element of the list is an object")
        # A row may lack a key: it holds null there.
        names = dict.fromkeys(name for row in rows for name in row)
        if rows and not set(columns) <= names.keys():
            return pa.schema([(name, pa.null()) for name in names]).empty_table()
        return pa.table({name: [row.get(name) for row in rows] for name in columns})
    return pyarrow.json.read_json(pa.BufferReader(data))


def drop_doubles(pairs: pa.Table) -> pa.Table:
    """The first row of every pair_key, in order."""
    _, first = np.unique(pairs["pair_key"].to_numpy(), return_index=True)
    return pairs.take(pa.array(np.sort(first)))
