"""Which rows of a table of vectors are wanted, and where they lie: files, row groups, rows in them.

Footers say which row groups are one encoder's and have a vector in every row, as a rule all of a part; where they do
not say so, and for filters, the narrow columns are read. Vectors are not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.keys import Keys, among
from pipeline.predicate import matching_keys
from pipeline.tables import Table
from pipeline.vectors.pages import seems_plain

Places = range | NDArray[np.int64]
KEY, ENCODER = "pair_key", "encoder"
_AT_ONCE = 1 << 20
"""Rows that one predicate is held against at once."""
_BATCH = 16_384
_LAYOUT = ds.ParquetFileFormat()


@dataclass(frozen=True)
class Source:
    """The files of a version of the table, and the column of vectors that is wanted of them."""

    filesystem: pa_fs.FileSystem
    paths: tuple[str, ...]
    schema: pa.Schema
    encoder: str
    column: str
    width: int | None
    """Bytes of a vector, where that is known."""

    def chunk(self, path: str, place: tuple[int, int]) -> pa.Buffer:
        """Bytes of a file, by offset and size: of a local one as a map."""
        local = isinstance(self.filesystem, pa_fs.LocalFileSystem)
        with pa.memory_map(path) if local else self.filesystem.open_input_file(path) as file:
            file.seek(place[0])
            return file.read_buffer(place[1])

    def batches(self, path: str, number: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Columns of a row group as Arrow reads them, whatever their encoding, some rows at a time."""
        fragment = _LAYOUT.make_fragment(path, self.filesystem, row_groups=[number])
        schema = pa.schema([self.schema.field(n) for n in names])
        yield from fragment.to_batches(schema=schema, columns=list(names), batch_size=_BATCH, use_threads=False)

    def table(self, path: str, number: int, names: Sequence[str]) -> pa.Table:
        """The same, whole: for narrow columns."""
        schema = pa.schema([self.schema.field(n) for n in names])
        return pa.Table.from_batches(self.batches(path, number, names), schema)


@dataclass(frozen=True)
class Filter:
    """``span``: keys from the first up to, but not including, the second; ``among``: these sorted keys."""

    span: tuple[int, int] | None = None
    among: Keys | None = None

    def __bool__(self) -> bool:
        return self.span is not None or self.among is not None

    def __call__(self, keys: Keys) -> NDArray[np.bool_]:
        passed = np.ones(len(keys), np.bool_)
        if self.span is not None:
            passed &= (keys >= self.span[0]) & (keys < self.span[1])
        if self.among is not None:
            passed &= among(self.among, keys)
        return passed


@dataclass(frozen=True)
class Group:
    """A row group, and the places of its wanted rows; ``keys`` of those, once they are read.

    ``chunk``: offset and bytes of its column of vectors where that is uncompressed and without dictionary.
    """

    path: str
    number: int
    size: int
    chunk: tuple[int, int] | None
    nullable: bool
    rows: Places
    keys: Keys | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> Group:
        """Of the wanted rows those from ``first`` up to ``last``."""
        keys = None if self.keys is None else self.keys[first:last]
        return replace(self, rows=self.rows[first:last], keys=keys)

    def kept(self, passed: NDArray[np.bool_]) -> Group:
        """Of the wanted rows those that passed."""
        if passed.all():
            return self
        return replace(self, rows=np.asarray(self.rows)[passed], keys=None if self.keys is None else self.keys[passed])


def open_source(
    table: Table, what: tuple[str, str], version: int | None, width: int | None, only: Collection[str] | None = None
) -> Source | None:
    """The table's files at a version (of them ``only`` these), None where there is no table. ``what``: encoder and
    modality."""
    opened = table.open(version) if version is None or version >= 0 else None
    if opened is None:
        return None
    filesystem, folder = pa_fs.FileSystem.from_uri(opened.table_uri)
    # In an order of their own: the log's depends on its checkpoints.
    paths = sorted(pa.table(opened.get_add_actions(flatten=True))["path"].to_pylist())
    paths = paths if only is None else [path for path in paths if path in only]
    located = tuple(f"{folder.rstrip('/')}/{unquote(path)}" for path in paths)
    return Source(filesystem, located, table.spec.schema, what[0], f"{what[1]}_vec", width)


def survey(source: Source, wanted: Filter, path: str, *, keys: bool) -> tuple[Group | None, list[Group]]:
    """The row groups of a file with wanted rows, after one that has vectors of the encoder at all, if any has.

    ``keys``: read the keys, too, while the file is open.
    """
    known: Group | None = None
    groups: list[Group] = []
    with source.filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        footer = parquet.metadata
        names = footer.schema.names
        if source.column not in names:
            return None, []
        at = names.index(source.column)
        nullable = footer.schema.column(at).max_definition_level > 0
        for number in range(footer.num_row_groups):
            described = footer.row_group(number)
            passed = _own(source, path, number, described.column(names.index(ENCODER)))
            if passed is not None and not passed.any():
                continue
            group = Group(path, number, described.num_rows, _chunk(described.column(at)), nullable, range(0))
            passed = _both(passed, _there(source, group, described.column(at)))
            group = replace(group, rows=_rows(passed, group.size))
            known = known or (group if len(group) else None)
            if len(group) and (keys or wanted):
                column = parquet.read_row_group(number, [KEY], use_threads=False)[KEY].to_numpy()
                group = replace(group, keys=_taken(column, group.rows))
                group = group.kept(wanted(_known(group))) if wanted else group
            if len(group):
                groups.append(group)
    return known, groups


def matching(pool: Executor, source: Source, groups: Sequence[Group], predicate: str) -> list[Group]:
    """Of the wanted rows those for which an SQL predicate over the narrow columns is true.

    Raises:
        UsageError: it is no such predicate.
    """
    narrow = [n for n in source.schema.names if not n.endswith("_vec")]
    matching_keys(pa.schema([source.schema.field(n) for n in narrow]).empty_table(), predicate)
    names = [KEY, *(n for n in narrow if n != KEY and n.casefold() in predicate.casefold())]
    found: list[Group] = []
    for some in batched(groups, _AT_ONCE):
        tables = list(pool.map(partial(_narrow, source, names), some))
        keys = np.sort(matching_keys(pa.concat_tables(tables), predicate))
        for group, table in zip(some, tables, strict=True):
            known = replace(group, keys=table[KEY].to_numpy())
            found.append(known.kept(among(keys, _known(known))))
    return [group for group in found if len(group)]


def with_keys(pool: Executor, source: Source, groups: Sequence[Group]) -> list[Group]:
    """The same row groups, with their keys."""
    return list(pool.map(partial(_with_keys, source), groups))


def share(groups: Sequence[Group], rank: int, world: int) -> list[Group]:
    """A rank's rows: all ranks' are disjoint, complete, in order and differ by one row at most."""
    total = sum(map(len, groups))
    first, last = total * rank // world, total * (rank + 1) // world
    mine, at = [], 0
    for group in groups:
        part = group.part(max(first - at, 0), max(last - at, 0))
        at += len(group)
        if len(part):
            mine.append(part)
    return mine


def batched(groups: Iterable[Group], size: int) -> Iterator[list[Group]]:
    """Row groups, cut, in lists of ``size`` wanted rows; the last may have fewer."""
    held: list[Group] = []
    room = size
    for group in groups:
        at = 0
        while at < len(group):
            part = group.part(at, at + room)
            held.append(part)
            at += len(part)
            room -= len(part)
            if room == 0:
                yield held
                held, room = [], size
    if held:
        yield held


def _with_keys(source: Source, group: Group) -> Group:
    if group.keys is not None:
        return group
    with source.filesystem.open_input_file(group.path) as file:
        column = pq.ParquetFile(file).read_row_group(group.number, [KEY], use_threads=False)[KEY].to_numpy()
    return replace(group, keys=_taken(column, group.rows))


def _known(group: Group) -> Keys:
    assert group.keys is not None, "the keys are read before they are asked for"
    return group.keys


def _narrow(source: Source, names: Sequence[str], group: Group) -> pa.Table:
    table = source.table(group.path, group.number, names)
    if isinstance(group.rows, range):
        return table.slice(group.rows.start, len(group.rows))
    return table.take(pa.array(group.rows))


def _taken(column: Keys, rows: Places) -> Keys:
    return column[rows.start : rows.stop] if isinstance(rows, range) else column[rows]


def _rows(passed: NDArray[np.bool_] | None, size: int) -> Places:
    return range(size) if passed is None or passed.all() else np.flatnonzero(passed)


def _both(one: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return other if one is None else one if other is None else one & other


def _own(source: Source, path: str, number: int, column: Any) -> NDArray[np.bool_] | None:
    """Which rows are the encoder's; None: all."""
    statistics = column.statistics
    if statistics is not None and statistics.has_min_max and statistics.null_count == 0:
        if statistics.min == statistics.max == source.encoder:
            return None
        if not statistics.min <= source.encoder <= statistics.max:
            return np.zeros(column.num_values, np.bool_)
    encoders = source.table(path, number, [ENCODER])[ENCODER]
    return np.asarray(pc.fill_null(pc.equal(encoders, source.encoder), False))


def _there(source: Source, group: Group, column: Any) -> NDArray[np.bool_] | None:
    """Which rows have a vector; None: all."""
    statistics = column.statistics
    if statistics is not None and statistics.has_null_count:
        if statistics.null_count == 0:
            return None
        if statistics.null_count == group.size:
            return np.zeros(group.size, np.bool_)
    elif group.chunk is not None and source.width is not None:
        chunk = source.chunk(group.path, group.chunk)
        if seems_plain(chunk, group.size, source.width, nullable=group.nullable):
            return None
    valid = [np.asarray(b.column(0).is_valid()) for b in source.batches(group.path, group.number, [source.column])]
    return np.concatenate(valid)


def _chunk(column: Any) -> tuple[int, int] | None:
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
        return None
    return column.data_page_offset, column.total_compressed_size
