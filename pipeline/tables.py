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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import ColumnProperties, CommitProperties, DeltaTable, Schema, WriterProperties
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.table import TableMerger
from deltalake.transaction import AddAction, RemoveAction, Transaction
from upath import UPath

from pipeline.storage import storage_error
from pipeline.table_reader import WRITER, TableReader, actions
from schemas.errors import SchemaError, WorkspaceError
from schemas.tables import TableSpec

ROW_GROUP = 2048
_ATTEMPTS = 50

T = TypeVar("T")


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


class Table(TableReader):
    """A Delta table under the workspace. Picklable; a worker needs only :meth:`write_part` and reads."""

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
        binary = _binary(rows.schema)
        # Keys are hashes: neither a dictionary nor zstd makes them smaller, and both make them slower to read.
        plain = [*binary, *(n for n in self.spec.key[:1] if pa.types.is_integer(rows.schema.field(n).type))]
        other = [n for n in rows.schema.names if n not in plain]
        codec = {n: "none" if n in plain else "zstd" for n in rows.schema.names}
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
        apart = self._disjoint(parts)

        def add(table: DeltaTable) -> Commit:
            fresh = [p for p in (self._without_known(part, table) for part in apart) if p.rows]
            if not fresh:
                return Commit(int(table.version()), 0)
            actions = [_add_action(p) for p in fresh]
            table.create_write_transaction(
                actions, mode="append", schema=table.schema(), commit_properties=_properties(table, run)
            )
            # Without retries the commit is the one after the version looked at; the handle itself stays behind.
            return Commit(int(table.version()) + 1, sum(p.rows for p in fresh))

        return self._commit(add)

    def append(self, rows: pa.Table, run: str) -> Commit:
        """Write and commit rows from the driver."""
        if rows.num_rows == 0:
            return Commit(self.version(), 0)
        return self.commit([self.write_part(rows)], run)

    def upsert(
        self,
        rows: pa.Table,
        run: str,
        replace: str | None = None,
        touch: Sequence[str] = (),
        record: dict[str, int] | None = None,
    ) -> int:
        """Replace the rows with these keys, or add them, in one transaction. Returns the version.

        With ``replace``, an SQL condition on ``source`` and ``target``, only the rows that meet it are replaced;
        the others get the columns ``touch`` alone. ``record``: numbers that :meth:`recorded` finds again.
        """
        rows = self.spec.conform(rows)

        def put(table: DeltaTable) -> int:
            merge = self._merge(table, rows, _properties(table, run, record)).when_matched_update_all(replace)
            if touch:
                merge = merge.when_matched_update({name: f"source.{name}" for name in touch})
            merge.when_not_matched_insert_all().execute()
            return int(table.version())

        return self._commit(put)

    def update(self, rows: pa.Table, run: str, where: str | None = None) -> int:
        """Set the columns of ``rows`` (the key, and some others) in the rows with these keys, in one transaction.

        Keys that are not there are passed over. ``where``: an SQL condition on ``source`` and ``target``; rows that
        do not meet it stay as they are. Returns the version.
        """
        schema = pa.schema([self.spec.schema.field(n) for n in rows.column_names])
        rows = TableSpec(self.spec.name, schema, self.spec.key).conform(rows)
        columns = {f"`{n}`": f"source.`{n}`" for n in rows.column_names if n not in self.spec.key}

        def change(table: DeltaTable) -> int:
            self._merge(table, rows, _properties(table, run)).when_matched_update(columns, where).execute()
            return int(table.version())

        return self._commit(change)

    def swap(self, files: Sequence[str], part: Part, run: str) -> int:
        """Put ``part`` in the place of files with the same keys, in one transaction. Returns how many rows went in.

        0, where the table no longer holds all of these files: what came instead of them stays.
        """

        def write(table: DeltaTable) -> int:
            sizes = {action["path"]: action["size_bytes"] for action in actions(table)}
            if not set(files) <= sizes.keys():
                return 0
            now = int(time.time() * 1000)
            table.create_write_transaction(
                [*(RemoveAction(f, True, now, sizes[f], {}) for f in files), _add_action(part)],
                mode="append",
                schema=table.schema(),
                commit_properties=_properties(table, run),
            )
            return part.rows

        return self._commit(write)

    def record(self, numbers: dict[str, int], run: str) -> int:
        """Leave numbers in the log for :meth:`recorded`, in a commit without rows. Returns the version."""

        def write(table: DeltaTable) -> int:
            properties = _properties(table, run, numbers)
            table.create_write_transaction([], "append", table.schema(), commit_properties=properties)
            return int(table.version()) + 1

        return self._commit(write)

    def stamp(self, texts: dict[str, str], run: str) -> None:
        """Write texts into the table's metadata, for :meth:`stamps`; nothing where they stand there already."""

        def write(table: DeltaTable) -> None:
            have = table.metadata().configuration
            if any(have.get(name) != text for name, text in texts.items()):
                table.alter.set_table_properties(
                    texts, raise_if_not_exists=False, commit_properties=_properties(table, run)
                )

        self._commit(write)

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

    def _commit(self, write: Callable[[DeltaTable], T]) -> T:
        """``write(table)``, which makes one commit, again and again until no other writer is faster."""
        for _ in range(_ATTEMPTS):
            table = self._open_or_create()
            try:
                return write(table)
            except CommitFailedError:
                continue
            except (DeltaError, OSError) as exc:
                raise _commit_error(exc, self.uri) from exc
        raise self._outrun()

    def _outrun(self) -> WorkspaceError:
        return WorkspaceError(f"{_ATTEMPTS} writers in a row were faster on {self.uri}", remedy="run the command again")

    def _merge(self, table: DeltaTable, rows: pa.Table, properties: CommitProperties) -> TableMerger:
        first = self.spec.key[0]
        match = " AND ".join(f"target.{k} = source.{k}" for k in self.spec.key)
        if pa.types.is_integer(rows.schema.field(first).type) and rows.num_rows:
            span = pc.min_max(rows[first]).as_py()  # files of other keys are not even opened
            match += f" AND target.{first} >= {span['min']} AND target.{first} <= {span['max']}"
        return table.merge(
            rows,
            match,
            source_alias="source",
            target_alias="target",
            writer_properties=_writer_properties(self.spec.schema),
            commit_properties=properties,
        )

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
        """The table, with all columns of the spec: those that it lacks (of an older version) are null in its rows."""
        for _ in range(_ATTEMPTS):
            table = self.open()
            try:
                if table is None:
                    return DeltaTable.create(self.uri, schema=self.spec.schema, mode="ignore", name=self.spec.name)
                missing = self._missing(table)
                if not missing:
                    return table
                fields = Schema.from_arrow(pa.schema(missing)).fields
                table.alter.add_columns(fields, commit_properties=_properties(table))
            except CommitFailedError:
                continue  # another writer was first, perhaps with these columns
            except (DeltaError, OSError) as exc:
                raise _commit_error(exc, self.uri) from exc
        raise self._outrun()

    def _missing(self, table: DeltaTable) -> list[pa.Field]:
        have = {f.name for f in table.schema().fields}
        return [field for field in self.spec.schema if field.name not in have]

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


def _properties(table: DeltaTable, run: str = "", record: dict[str, int] | None = None) -> CommitProperties:
    last = table.transaction_version(WRITER)
    return CommitProperties(
        custom_metadata={"run": run} if run else None,
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


def _binary(schema: pa.Schema) -> list[str]:
    """Columns of bytes, pictures and vectors: nothing makes them smaller."""
    return [f.name for f in schema if pa.types.is_binary(f.type)]


def _writer_properties(schema: pa.Schema) -> WriterProperties | None:
    """How delta-rs is to rewrite files: bytes stay as quick to read as :meth:`Table.write_part` leaves them."""
    binary = _binary(schema)
    if not binary:
        return None
    plain = {name: ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE") for name in binary}
    return WriterProperties(max_row_group_size=ROW_GROUP, compression="UNCOMPRESSED", column_properties=plain)
