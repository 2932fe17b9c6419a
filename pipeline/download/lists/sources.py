"""Read lists of pairs: files, directories and globs of parquet, csv, tsv, json, jsonl and txt."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from upath import UPath

from pipeline.download.archives.layouts import is_tar
from pipeline.download.lists import parquet
from pipeline.download.lists.delimited import Delimited
from pipeline.download.lists.lines import JsonLines, Lines, array
from pipeline.download.lists.records import Columns
from pipeline.download.lists.streams import parsed, text_blocks
from schemas.errors import UsageError
from schemas.keys import pair_keys

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")
ROWS = 65_536
BYTES = 64 << 20
"""A batch has no more rows, and about so many bytes at most."""

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
                expected="a file, directory or glob of " + ", ".join(FORMATS) + " (plain, .gz or .zst), tar",
                remedy="check the path",
            )
        files |= {str(hit): hit for hit in hits}
    return [files[name] for name in sorted(files)]


def _expand(pattern: str) -> Iterator[UPath]:
    path = UPath(pattern)
    if path.is_dir():
        yield from (p for p in path.rglob("*") if p.is_file() and (_format(p.name)[0] in FORMATS or is_tar(p.name)))
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


def read_batches(file: UPath, columns: Columns) -> Iterator[pa.Table]:
    """A list's rows, in order, in memory that does not grow with the file.

    Each batch has pair_key, url, caption, source, extra (the other columns as a JSON object, null without any) and
    problem. **Every row of the list is a row here.** One that cannot be read has a problem, "REASON: what is wrong",
    with bad_record or bad_caption of :class:`~schemas.errors.Reason`; its url is what could be read of it, its
    caption is the row's text after its line number. Empty lines are no rows. A packed stream that is cut off gives
    the rows before the cut, then one bad row that says so.

    Raises:
        UsageError: unknown format, unreadable, or without the named columns (it names those there are).
    """
    for table in _regroup(_records(file, columns)):
        keys = pa.array(pair_keys(table["url"].to_pylist(), table["caption"].to_pylist()))
        source = pa.repeat(pa.scalar(str(file)), len(keys))
        yield table.add_column(0, "pair_key", keys).add_column(3, "source", source)


def _records(file: UPath, columns: Columns) -> Iterator[pa.Table]:
    kind, packed = _format(file.name)
    if kind == "parquet":
        return parquet.read(file, packed, columns)
    if kind not in FORMATS:
        raise UsageError(f"{file}: unknown format", expected=", ".join(FORMATS), actual=kind or "no suffix")
    blocks = text_blocks(file, packed)
    if kind in ("csv", "tsv"):
        return parsed(blocks, Delimited(file, columns, "\t" if kind == "tsv" else ","))
    if kind == "txt":
        if columns.extra not in ((), ("*",)):
            raise UsageError(f"{file} has no columns: a line of txt is a URL", actual=", ".join(columns.extra))
        return parsed(blocks, Lines())
    return _json(file, blocks, columns, may_be_array=kind == "json")


def _json(file: UPath, blocks: Iterator[bytes], columns: Columns, *, may_be_array: bool) -> Iterator[pa.Table]:
    first = next(blocks, b"")
    blocks = itertools.chain([first], blocks)
    if may_be_array and first.lstrip()[:1] == b"[":
        yield from array(file, blocks, columns)
        return
    parser = JsonLines(columns)
    held: list[pa.Table] | None = []
    for table in parsed(blocks, parser):
        if held is None:
            yield table
            continue
        # The columns are known only from the rows, and a row may lack some: give them a batch's time to turn up.
        held.append(table)
        if not parser.names.keys() >= set(columns.named):
            if sum(t.num_rows for t in held) < ROWS and sum(t.nbytes for t in held) < BYTES:
                continue
            columns.check(file, parser.names)
        yield from held
        held = None
    if held:
        if parser.names:
            columns.check(file, parser.names)
        yield from held


def _regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in batches of at most :data:`ROWS` and about :data:`BYTES`."""
    held: list[pa.Table] = []
    rows = size = 0
    for piece in itertools.chain.from_iterable(map(_pieces, tables)):
        if held and (rows + piece.num_rows > ROWS or size + piece.nbytes > BYTES):
            yield pa.concat_tables(held).combine_chunks()
            held, rows, size = [], 0, 0
        held.append(piece)
        rows, size = rows + piece.num_rows, size + piece.nbytes
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    step = max(1, min(ROWS, table.num_rows * BYTES // max(1, table.nbytes)))
    for start in range(0, table.num_rows, step):
        yield table.slice(start, step)


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
