"""Reading Delta tables: rows at once or as a stream, of files and keys, and what the log says beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pa_fs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from schemas.errors import SchemaError, WorkspaceError
from schemas.tables import TableSpec

WRITER = "clipmill-writer"
"""Whose commits are numbered."""
_PLAIN = {
    pa.string_view(): pa.string(), pa.large_string(): pa.string(),
    pa.binary_view(): pa.binary(), pa.large_binary(): pa.binary(),
}  # fmt: skip


class TableReader:
    """A Delta table under the workspace, to be read. Picklable."""

    def __init__(self, uri: str, spec: TableSpec) -> None:
        self.uri, self.spec = uri, spec

    def widened(self, fields: Sequence[pa.Field]) -> Self:
        """The same table with these columns beside its own: its rows have them, and its first write adds them.

        Raises:
            SchemaError: one of them is there with another type.
        """
        have = self.columns()
        for field in fields:
            if have.get(field.name, field.type) != field.type:
                raise SchemaError(
                    f"the table {self.spec.name} has another column {field.name}",
                    expected=str(field.type),
                    actual=str(have[field.name]),
                    remedy="choose another name",
                )
        new = {field.name: field for field in fields if field.name not in self.spec.schema.names}
        schema = pa.schema([*self.spec.schema, *new.values()])
        return type(self)(self.uri, TableSpec(self.spec.name, schema, self.spec.key))

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

    # -- what the log says ---------------------------------------------------------------------------

    def version(self) -> int:
        """The newest version, -1 where there is no table."""
        table = self.open()
        return -1 if table is None else int(table.version())

    def columns(self) -> dict[str, pa.DataType]:
        """Names and types of the table as it is: its own columns, and further ones that were added to it."""
        return {field.name: field.type for field in self._schema(self.open())}

    def recorded(self, name: str) -> int:
        """The number that :meth:`Table.replace` or :meth:`Table.record` last left under ``name``, -1 for none."""
        table = self.open()
        found = None if table is None else table.transaction_version(name)
        return -1 if found is None else int(found)

    def foreign(self) -> int:
        """How many commits were not made by :class:`Table`: deleted rows, compaction. As long as it stays the same,
        nothing was taken out of the table."""
        table = self.open()
        return 0 if table is None else int(table.version()) - (table.transaction_version(WRITER) or 0)

    def writers(self, since: int) -> set[str]:
        """The runs that committed after that version; those of no run are left out."""
        table = self.open()
        ahead = 0 if table is None else int(table.version()) - max(since, 0)
        return {entry["run"] for entry in table.history(ahead) if "run" in entry} if table and ahead > 0 else set()

    def stamps(self) -> dict[str, str]:
        """The texts in the table's metadata: see :meth:`Table.stamp`."""
        table = self.open()
        return {} if table is None else dict(table.metadata().configuration)

    def count(self) -> int:
        table = self.open()
        if table is None:
            return 0
        return int(pc.sum(pa.table(table.get_add_actions(flatten=True))["num_records"]).as_py() or 0)

    def files(self, version: int | None = None) -> list[str]:
        """URIs of the table's live Parquet files."""
        table = self.open(version)
        return [] if table is None else list(table.file_uris())

    def paths(self, version: int | None = None) -> set[str]:
        """The table's live Parquet files, as the log names them. No file ever changes, so new rows are in new files."""
        table = self.open(version)
        return set() if table is None else {action["path"] for action in actions(table)}

    def seen_paths(self, version: int) -> set[str]:
        """:meth:`paths` of an earlier version; none for -1, or for one which the log no longer holds."""
        try:
            return self.paths(version) if version >= 0 else set()
        except WorkspaceError:
            return set()

    # -- rows ----------------------------------------------------------------------------------------

    def read(
        self,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """Rows as one Arrow table; empty, with the schema, where there is no table. Further columns by their names."""
        names = list(columns or self.spec.schema.names)
        table = self.open(version)
        schema = self._schema(table)
        empty = _only(schema, names).empty_table()
        if table is None:
            return empty
        dataset = self._dataset(table)
        try:
            return dataset.to_table(columns=names, filter=where)
        except pa.ArrowNotImplementedError:
            # delta-rs rewrites files (merge, compaction) with string views, to whose statistics Arrow compares no
            # string: filter after reading, a batch at a time. A column that is only named like one used is no harm.
            used = [n for n in schema.names if n in names or n in str(where)]
            batches = (pa.Table.from_batches([b]) for b in dataset.to_batches(columns=used))
            found = [b.filter(where).select(names) for b in batches]
            return pa.concat_tables([empty, *found])

    def dataset(self) -> ds.Dataset:
        """The table as an Arrow dataset of this moment, for DuckDB and for streaming; empty where there is none."""
        table = self.open()
        if table is None:
            return ds.dataset(self.spec.schema.empty_table())
        return self._dataset(table)

    def keys(self, where: pc.Expression | None = None) -> pa.Table:
        return self.read(self.spec.key, where)

    def batches(
        self, columns: Sequence[str], version: int | None = None, paths: set[str] | None = None
    ) -> pa.RecordBatchReader:
        """Rows as a stream, for what need not be in memory at once; of the files ``paths`` (None: of all)."""
        table = self.open(version)
        schema = _only(self._schema(table), columns)
        if table is None:
            return pa.RecordBatchReader.from_batches(schema, [])
        batches = self._dataset(table, paths).to_batches(columns=list(columns), batch_readahead=2, fragment_readahead=2)
        return pa.RecordBatchReader.from_batches(schema, batches)

    def places(
        self, columns: Sequence[str], version: int | None = None, paths: set[str] | None = None
    ) -> tuple[list[str], pa.RecordBatchReader]:
        """:meth:`batches` with where each row is: ``file``, int32, which of the files that are returned, too."""
        table = self.open(version)
        schema = _only(self._schema(table), columns).append(pa.field("file", pa.int32()))
        if table is None:
            return [], pa.RecordBatchReader.from_batches(schema, [])
        live = [a["path"] for a in actions(table) if paths is None or a["path"] in paths]
        dataset = self._dataset(table, set(live))
        names = pa.array(dataset.files, pa.string())

        def batches() -> Iterator[pa.RecordBatch]:
            wanted = [*columns, "__filename"]
            for batch in dataset.to_batches(columns=wanted, batch_readahead=2, fragment_readahead=2):
                file = pc.index_in(batch.column("__filename").cast(pa.string()), names)
                yield pa.RecordBatch.from_arrays([*(batch.column(c) for c in columns), file], schema=schema)

        return live, pa.RecordBatchReader.from_batches(schema, batches())

    def take(self, keys: Mapping[str, pa.Array | None], columns: Sequence[str]) -> pa.Table:
        """The rows with these first keys (None: all) out of these files, as the log names them. It is not looked at.

        A file that the table no longer holds (its rows were changed, or it was compacted) is there until a vacuum.

        Raises:
            WorkspaceError: a file is gone, or lacks a row.
        """
        filesystem, folder = pa_fs.FileSystem.from_uri(self.uri)
        layout, first = ds.ParquetFileFormat(), self.spec.key[0]
        found = [_only(self.spec.schema, columns).empty_table()]
        for path, wanted in keys.items():
            where = None if wanted is None else _among(first, wanted)
            try:
                fragment = layout.make_fragment(f"{folder.rstrip('/')}/{unquote(path)}", filesystem)
                rows = fragment.to_table(schema=self.spec.schema, columns=list(columns), filter=where)
            except FileNotFoundError as exc:
                raise _changed(path, self.uri, "the file", "none: it was vacuumed") from exc
            if wanted is not None and rows.num_rows < len(wanted):
                raise _changed(path, self.uri, f"{len(wanted)} rows", str(rows.num_rows))
            found.append(rows)
        return pa.concat_tables(found)

    def _schema(self, table: DeltaTable | None) -> pa.Schema:
        """The spec's columns, then what the table has beside them."""
        if table is None:
            return self.spec.schema
        more = [f for f in pa.schema(table.schema()) if f.name not in self.spec.schema.names]
        return pa.schema([*self.spec.schema, *(pa.field(f.name, _PLAIN.get(f.type, f.type)) for f in more)])

    def _dataset(self, table: DeltaTable, paths: set[str] | None = None) -> ds.Dataset:
        """The live files (of ``paths``), each with the range of its keys: a filter opens only the files it needs.

        (``DeltaTable.to_pyarrow_dataset`` compares columns without statistics with null: it finds no row.)
        """
        filesystem, folder = pa_fs.FileSystem.from_uri(table.table_uri)
        layout, first = ds.ParquetFileFormat(), self.spec.key[0]
        fragments = []
        for action in actions(table):
            if paths is not None and action["path"] not in paths:
                continue
            low, high = action.get(f"min.{first}"), action.get(f"max.{first}")
            known = low is not None and high is not None
            span = (pc.field(first) >= low) & (pc.field(first) <= high) if known else None
            path = f"{folder.rstrip('/')}/{unquote(action['path'])}"
            fragments.append(layout.make_fragment(path, filesystem, partition_expression=span))
        return ds.FileSystemDataset(fragments, self._schema(table), layout, filesystem)


def actions(table: DeltaTable) -> list[dict[str, Any]]:
    """What the log says of each live file."""
    found: list[dict[str, Any]] = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    return found


def _only(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    if missing := [n for n in names if n not in schema.names]:
        raise SchemaError("no such columns", expected=", ".join(schema.names), actual=", ".join(missing))
    return pa.schema([schema.field(n) for n in names])


def _changed(path: str, uri: str, expected: str, actual: str) -> WorkspaceError:
    return WorkspaceError(
        f"{path} of the table {uri} has changed",
        expected=expected,
        actual=actual,
        remedy="do not vacuum while a job runs; run it again",
    )


def _among(column: str, wanted: pa.Array) -> pc.Expression:
    """Is it one of these? With their range, by which row groups of a file are skipped."""
    span, field = pc.min_max(wanted).as_py(), pc.field(column)
    return (field >= span["min"]) & (field <= span["max"]) & field.isin(wanted)
