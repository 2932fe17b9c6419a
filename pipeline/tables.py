"""The one way of committing: Delta tables whose parts are written by workers and committed by a driver.

1. A worker writes a Parquet file under a name of its own and returns a :class:`Part` (no reader sees it).
2. The driver adds parts in one commit, which carries the application transaction ``(WRITER, n + 1)``: of
   racing commits on one version exactly one wins, the others look at what was added meanwhile.
3. A part any of whose keys is in the table already (a racing run's, a repeated one) loses those rows first.

So no key is ever doubled, whoever races and whatever is killed between 1 and 2.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, Transaction
from upath import UPath

from pipeline.storage import storage_error
from schemas.errors import SchemaError, WorkspaceError
from schemas.tables import TableSpec

WRITER = "clipmill-writer"
ROW_GROUP = 2048
_ATTEMPTS = 50


@dataclass(frozen=True)
class Part:
    """A Parquet file that a worker wrote into a table's folder, not yet committed."""

    table: str
    path: str
    rows: int
    bytes: int
    keys: pa.Table
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """What a commit did: the table's version and how many rows went in (others were there already)."""

    version: int
    rows: int


class Table:
    """A Delta table under the workspace. Picklable; a worker needs only :meth:`write_part` and reads."""

    def __init__(self, uri: str, spec: TableSpec) -> None:
        self.uri, self.spec = uri, spec

    # -- reading -------------------------------------------------------------------------------------

    def open(self, version: int | None = None) -> DeltaTable | None:
        """The Delta table, or None where nothing was ever committed."""
        try:
            return DeltaTable(self.uri, version=version)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as exc:
            raise WorkspaceError(
                f"cannot read the table {self.uri}", actual=str(exc), remedy="check the path given as --workspace"
            ) from exc

    def version(self) -> int:
        """The newest version, -1 where there is no table."""
        table = self.open()
        return -1 if table is None else int(table.version())

    def read(
        self,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """Rows as one Arrow table; empty, with the schema, where there is no table."""
        names = list(columns or self.spec.schema.names)
        table = self.open(version)
        if table is None:
            return pa.schema([self.spec.schema.field(n) for n in names]).empty_table()
        dataset = self._dataset(table)
        try:
            return dataset.to_table(columns=names, filter=where)
        except pa.ArrowNotImplementedError:
            # delta-rs rewrites files (merge, compaction) with string views, to whose statistics Arrow compares no
            # string: filter after reading, a batch at a time. A column that is only named like one used is no harm.
            used = [n for n in self.spec.schema.names if n in names or n in str(where)]
            batches = (pa.Table.from_batches([b]) for b in dataset.to_batches(columns=used))
            found = [b.filter(where).select(names) for b in batches]
            return pa.concat_tables([pa.schema([self.spec.schema.field(n) for n in names]).empty_table(), *found])

    def dataset(self) -> ds.Dataset:
        """The table as an Arrow dataset of this moment, for DuckDB and for streaming; empty where there is none."""
        table = self.open()
        if table is None:
            return ds.dataset(self.spec.schema.empty_table())
        return self._dataset(table)

    def keys(self, where: pc.Expression | None = None) -> pa.Table:
        return self.read(self.spec.key, where)

    def files(self, version: int | None = None) -> list[str]:
        """URIs of the table's live Parquet files."""
        table = self.open(version)
        return [] if table is None else list(table.file_uris())

    def paths(self, version: int | None = None) -> set[str]:
        """The table's live Parquet files, as the log names them. No file ever changes, so new rows are in new files."""
        table = self.open(version)
        return set() if table is None else set(pa.table(table.get_add_actions(flatten=True))["path"].to_pylist())

    def batches(
        self, columns: Sequence[str], version: int | None = None, paths: set[str] | None = None
    ) -> pa.RecordBatchReader:
        """Rows as a stream, for what need not be in memory at once; of the files ``paths`` (None: of all)."""
        schema = pa.schema([self.spec.schema.field(n) for n in columns])
        table = self.open(version)
        if table is None:
            return pa.RecordBatchReader.from_batches(schema, [])
        batches = self._dataset(table, paths).to_batches(columns=list(columns), batch_readahead=2, fragment_readahead=2)
        return pa.RecordBatchReader.from_batches(schema, batches)

    def recorded(self, name: str) -> int:
        """The number that :meth:`replace` last recorded under ``name``, -1 where there is none."""
        table = self.open()
        found = None if table is None else table.transaction_version(name)
        return -1 if found is None else int(found)

    def count(self) -> int:
        table = self.open()
        if table is None:
            return 0
        return int(pc.sum(pa.table(table.get_add_actions(flatten=True))["num_records"]).as_py() or 0)

    def _dataset(self, table: DeltaTable, paths: set[str] | None = None) -> ds.Dataset:
        """The live files (of ``paths``), each with the range of its keys: a filter opens only the files it needs.

        (``DeltaTable.to_pyarrow_dataset`` compares columns without statistics with null: it finds no row.)
        """
        filesystem, folder = pa_fs.FileSystem.from_uri(table.table_uri)
        layout, first = ds.ParquetFileFormat(), self.spec.key[0]
        fragments = []
        for action in pa.table(table.get_add_actions(flatten=True)).to_pylist():
            if paths is not None and action["path"] not in paths:
                continue
            low, high = action.get(f"min.{first}"), action.get(f"max.{first}")
            known = low is not None and high is not None
            span = (pc.field(first) >= low) & (pc.field(first) <= high) if known else None
            path = f"{folder.rstrip('/')}/{unquote(action['path'])}"
            fragments.append(layout.make_fragment(path, filesystem, partition_expression=span))
        return ds.FileSystemDataset(fragments, self.spec.schema, layout, filesystem)

    # -- writing -------------------------------------------------------------------------------------

    def write_part(self, rows: pa.Table, figures: dict[str, float] | None = None) -> Part:
        """Write ``rows`` as one Parquet file (in a worker). No reader sees it before :meth:`commit`."""
        rows = self.spec.conform(rows)
        keys = rows.select(self.spec.key)
        if len(set(_tuples(keys))) < rows.num_rows:
            raise SchemaError(
                f"rows for table {self.spec.name!r} hold a key twice",
                expected=f"one row for each {self.spec.key}",
            )
        name = f"part-{uuid.uuid4().hex}.parquet"
        sink = pa.BufferOutputStream()
        binary = [f.name for f in rows.schema if pa.types.is_binary(f.type)]
        other = [n for n in rows.schema.names if n not in binary]
        codec = {n: "none" if n in binary else "zstd" for n in rows.schema.names}
        pq.write_table(rows, sink, row_group_size=ROW_GROUP, use_dictionary=other, compression=codec)
        data = sink.getvalue()
        path = UPath(self.uri) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(memoryview(data))
        except OSError as exc:
            with suppress(OSError):  # of a disk that became read-only
                path.unlink(missing_ok=True)
            raise storage_error(exc, self.uri) from exc
        return Part(self.spec.name, name, rows.num_rows, data.size, keys, figures or {})

    def commit(self, parts: Sequence[Part], run: str) -> Commit:
        """Add ``parts`` in one transaction. Rows whose key is in the table already are left out."""
        parts = self._disjoint(parts)
        for _ in range(_ATTEMPTS):
            table = self._open_or_create()
            fresh = [p for p in (self._without_known(part, table) for part in parts) if p.rows]
            if not fresh:
                return Commit(int(table.version()), 0)
            try:
                table.create_write_transaction(
                    [_add_action(p) for p in fresh],
                    mode="append",
                    schema=table.schema(),
                    commit_properties=_properties(table, run),
                )
            except CommitFailedError:
                continue  # another writer was first: look again at what it added
            except (DeltaError, OSError) as exc:
                raise _commit_error(exc, self.uri) from exc
            # Without retries the commit is the one after the version looked at; the handle itself stays behind.
            return Commit(int(table.version()) + 1, sum(p.rows for p in fresh))
        raise WorkspaceError(f"{_ATTEMPTS} writers in a row were faster on {self.uri}", remedy="run the command again")

    def append(self, rows: pa.Table, run: str) -> Commit:
        """Write and commit rows from the driver."""
        if rows.num_rows == 0:
            return Commit(self.version(), 0)
        return self.commit([self.write_part(rows)], run)

    def upsert(self, rows: pa.Table, run: str, replace: str | None = None, touch: Sequence[str] = ()) -> int:
        """Replace the rows with these keys, or add them, in one transaction. Returns the version.

        With ``replace``, an SQL condition on ``source`` and ``target``, only the rows that meet it are replaced;
        the others get the columns ``touch`` alone.
        """
        rows = self.spec.conform(rows)
        first = self.spec.key[0]
        match = " AND ".join(f"target.{k} = source.{k}" for k in self.spec.key)
        if pa.types.is_integer(rows.schema.field(first).type) and rows.num_rows:
            span = pc.min_max(rows[first]).as_py()  # files of other keys are not even opened
            match += f" AND target.{first} >= {span['min']} AND target.{first} <= {span['max']}"
        for _ in range(_ATTEMPTS):
            table = self._open_or_create()
            merge = table.merge(
                rows,
                match,
                source_alias="source",
                target_alias="target",
                commit_properties=_properties(table, run),
            ).when_matched_update_all(replace)
            if touch:
                merge = merge.when_matched_update({name: f"source.{name}" for name in touch})
            try:
                merge.when_not_matched_insert_all().execute()
            except CommitFailedError:
                continue
            except (DeltaError, OSError) as exc:
                raise _commit_error(exc, self.uri) from exc
            return int(table.version())
        raise WorkspaceError(f"{_ATTEMPTS} writers in a row were faster on {self.uri}", remedy="run the command again")

    def replace(self, rows: pa.Table, gone: pa.Table, run: str, base: int, record: dict[str, int]) -> int | None:
        """Replace or add ``rows`` and delete the keys ``gone`` in one transaction, if the table is still at ``base``.

        ``record``: numbers that :meth:`recorded` finds again, written by the same transaction.

        Returns:
            The version, or None if another writer was first: what was found out at ``base`` may be wrong by now.
        """
        rows = self.spec.conform(rows)
        table = self._open_or_create()
        if table.version() != max(base, 0):
            return None
        properties = _properties(table, run, record)
        try:
            if rows.num_rows or gone.num_rows:
                self._merge_and_delete(table, rows, gone, properties)
            else:
                table.create_write_transaction([], "append", table.schema(), commit_properties=properties)
        except CommitFailedError:
            return None
        except (DeltaError, OSError) as exc:
            raise _commit_error(exc, self.uri) from exc
        return max(base, 0) + 1

    def _merge_and_delete(
        self, table: DeltaTable, rows: pa.Table, gone: pa.Table, properties: CommitProperties
    ) -> None:
        nothing = [
            pa.nulls(gone.num_rows, f.type) if f.name not in self.spec.key else gone[f.name] for f in rows.schema
        ]
        source = pa.concat_tables([rows, pa.table(nothing, schema=rows.schema)])
        marks = np.repeat([False, True], [rows.num_rows, gone.num_rows])
        source = source.append_column("gone", pa.array(marks))
        columns = {name: f"source.{name}" for name in self.spec.schema.names}
        (
            table.merge(
                source,
                " AND ".join(f"target.{k} = source.{k}" for k in self.spec.key),
                source_alias="source",
                target_alias="target",
                commit_properties=properties,
            )
            .when_matched_delete("source.gone")
            .when_matched_update(columns)
            .when_not_matched_insert(columns, "NOT source.gone")
            .execute()
        )

    def _open_or_create(self) -> DeltaTable:
        table = self.open()
        if table is None:
            try:
                return DeltaTable.create(self.uri, schema=self.spec.schema, mode="ignore", name=self.spec.name)
            except (DeltaError, OSError) as exc:
                raise _commit_error(exc, self.uri) from exc
        have = {f.name for f in table.schema().fields}
        if missing := [n for n in self.spec.schema.names if n not in have]:
            # A table of an older version: what it lacks is null in its rows.
            fields = Schema.from_arrow(pa.schema([self.spec.schema.field(n) for n in missing])).fields
            try:
                table.alter.add_columns(fields)
            except (DeltaError, OSError) as exc:
                raise _commit_error(exc, self.uri) from exc
        return table

    def _without_known(self, part: Part, table: DeltaTable) -> Part:
        """``part`` less the rows whose key ``table`` holds already: the part itself, as a rule."""
        return self._without(part, set(_tuples(self._candidates_for_overlap(part.keys, table))))

    def _disjoint(self, parts: Sequence[Part]) -> list[Part]:
        """``parts`` less the rows whose key an earlier one of them holds."""
        if len(parts) < 2:
            return list(parts)
        seen: set[tuple[Any, ...]] = set()
        apart = []
        for part in parts:
            apart.append(self._without(part, seen))
            seen.update(_tuples(part.keys))
        return apart

    def _without(self, part: Part, keys: set[tuple[Any, ...]]) -> Part:
        new = [key not in keys for key in _tuples(part.keys)] if keys else []
        if all(new):
            return part
        with (UPath(self.uri) / part.path).open("rb") as file:
            rows = pq.read_table(file)
        return self.write_part(rows.filter(pa.array(new, pa.bool_())), part.figures)

    def _candidates_for_overlap(self, keys: pa.Table, table: DeltaTable) -> pa.Table:
        """Keys in ``table`` whose first column is in ``keys``. Files and row groups of another range aren't read."""
        first = self.spec.key[0]
        if keys.num_rows == 0 or not table.file_uris():
            return keys.slice(0, 0)
        span = pc.min_max(keys[first]).as_py()
        near = (pc.field(first) >= span["min"]) & (pc.field(first) <= span["max"])
        same = pc.field(first).isin(pc.unique(keys[first]))
        return self._dataset(table).to_table(columns=list(self.spec.key), filter=near & same)


def _commit_error(exc: Exception, uri: str) -> WorkspaceError:
    """delta-rs tells of a failed write in prose, with the number of the system's error in it."""
    number = re.search(r"os error (\d+)", str(exc))
    if number:
        return storage_error(OSError(int(number[1]), os.strerror(int(number[1]))), uri)
    return WorkspaceError(f"cannot commit to {uri}", actual=str(exc), remedy="check the path given as --workspace")


def _tuples(keys: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in keys.columns), strict=True))


def _properties(table: DeltaTable, run: str, record: dict[str, int] | None = None) -> CommitProperties:
    last = table.transaction_version(WRITER)
    return CommitProperties(
        custom_metadata={"run": run},
        max_commit_retries=0,
        app_transactions=[Transaction(WRITER, (last or 0) + 1), *(Transaction(*r) for r in (record or {}).items())],
    )


def _add_action(part: Part) -> AddAction:
    ranges: dict[str, dict[str, Any]] = {"minValues": {}, "maxValues": {}}
    for name in part.keys.column_names:
        if pa.types.is_integer(part.keys.schema.field(name).type):
            span = pc.min_max(part.keys[name]).as_py()
            ranges["minValues"][name], ranges["maxValues"][name] = span["min"], span["max"]
    stats = json.dumps({"numRecords": part.rows, **ranges, "nullCount": dict.fromkeys(part.keys.column_names, 0)})
    return AddAction(part.path, part.bytes, {}, int(time.time() * 1000), True, stats)
