"""Parquet in small pieces, also of a single huge row group: only the columns that are wanted, and no more rows
in memory than a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from pipeline.download.lists.records import RECORDS, Columns, is_bytes, is_text, objects, with_nulls
from pipeline.download.lists.streams import bad, raw_text, readable
from schemas.errors import Reason, UsageError

_ROWS = 2048
_BYTES = 8 << 20
_BUFFER = 1 << 20


def read(file: UPath, packed: str | None, columns: Columns) -> Iterator[pa.Table]:
    """Records of a parquet file; a packed one is unpacked whole.

    Raises:
        UsageError: no parquet (cut off, say), or without the named columns, or they hold no text.
    """
    try:
        with file.open("rb") as raw:
            source: Any = raw
            if packed:
                source = pa.BufferReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), packed).read())
            # Pages are read as they are needed: a column of a row group may be larger than memory.
            reader = pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False)
            yield from _records(file, reader, columns)
    except (pa.ArrowException, OSError) as exc:
        raise UsageError(f"{file} is not a readable parquet file", actual=str(exc).partition("\n")[0]) from exc


def _records(file: UPath, reader: pq.ParquetFile, columns: Columns) -> Iterator[pa.Table]:
    schema = reader.schema_arrow
    others = [n for n in columns.others(file, schema.names) if not is_bytes(_plain_type(schema.field(n).type))]
    for name in (columns.url, columns.caption):
        _check_text(file, schema.field(name))
    names = list(dict.fromkeys([columns.url, columns.caption, *others]))
    row = 1
    for batch in reader.iter_batches(_batch_rows(reader), columns=names):
        yield _convert(batch, columns, others, row)
        row += batch.num_rows


def _batch_rows(reader: pq.ParquetFile) -> int:
    """Rows that are about :data:`_BYTES`, going by the largest mean of a row group."""
    groups = (reader.metadata.row_group(i) for i in range(reader.metadata.num_row_groups))
    mean = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=0)
    return max(1, min(_ROWS, int(_BYTES / max(1, mean))))


def _check_text(file: UPath, field: pa.Field) -> None:
    if pa.types.is_nested(_plain_type(field.type)):
        raise UsageError(
            f"{file}: the column {field.name!r} is not a column of text",
            expected="one column of strings",
            actual=str(field),
            remedy="name another with --url-col or --caption-col",
        )


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _convert(batch: pa.RecordBatch, columns: Columns, others: list[str], row: int) -> pa.Table:
    wrong: dict[int, list[str]] = {}
    arrays: dict[str, pa.Array] = {}
    for name in batch.schema.names:
        arrays[name], invalid = _text(batch.column(name), name in (columns.url, columns.caption))
        for i in invalid:
            wrong.setdefault(i, []).append(name)
    urls, captions = arrays[columns.url], arrays[columns.caption]
    problems = pa.nulls(batch.num_rows, pa.string())
    if wrong:
        texts, why = captions.to_pylist(), problems.to_pylist()
        for i, names in wrong.items():
            reason = Reason.BAD_CAPTION if names == [columns.caption] else Reason.BAD_RECORD
            why[i] = bad(reason, "invalid UTF-8 in " + ", ".join(map(repr, names)))
            texts[i] = raw_text(f"row {row + i}", texts[i])
        captions, problems = pa.array(texts, pa.string()), pa.array(why, pa.string())
    extra = with_nulls(objects(others, [arrays[name] for name in others], batch.num_rows), problems)
    return pa.table([urls, captions, extra, problems], schema=RECORDS)


def _text(array: pa.Array, needed: bool) -> tuple[pa.Array, list[int]]:
    """A column of text as valid strings, and which of its rows are not UTF-8.

    ``needed``: of URLs or captions; any type is made text, and null is empty. Other columns keep type and nulls.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    invalid: list[int] = []
    if is_text(array.type) or is_bytes(array.type):
        # Parquet vouches for nothing: a cast from bytes is what checks them.
        data = array.cast(pa.large_binary())
        try:
            array = data.cast(pa.large_string()).cast(pa.string())
        except pa.ArrowInvalid:
            array, invalid = _replaced(data)
    elif needed:
        if pa.types.is_floating(array.type):  # pandas: a column without any value
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        array = array.cast(pa.string())
    return pc.fill_null(array, "") if needed else array, invalid


def _replaced(data: pa.Array) -> tuple[pa.Array, list[int]]:
    texts: list[str | None] = []
    invalid: list[int] = []
    for i, value in enumerate(data.to_pylist()):
        text = None if value is None else value.decode("utf-8", "surrogateescape")
        if text is not None and (whole := readable(text)) != text:
            invalid.append(i)
            text = whole
        texts.append(text)
    return pa.array(texts, pa.string()), invalid
