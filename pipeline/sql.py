"""The workspace's tables in SQL: DuckDB in memory, over the tables' files, without access to anything else.

Every table is a view of its name. ``embeddings`` shows its vectors as FLOAT[D], so that DuckDB's functions of arrays
work on them; where encoders of several D are embedded they are FLOAT[] there, and FLOAT[D] in a view for each encoder:
see :func:`view_name`. Files are read when a query asks for them, and of them the columns that it uses.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from types import TracebackType
from typing import Any, Self, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.encoders import embedded_encoders, read_card
from pipeline.workspace import Workspace
from schemas.errors import ClipmillError, SchemaError, UsageError
from schemas.records import VECTORS
from schemas.tables import TABLES

_READ_AHEAD = {"batch_readahead": 2, "fragment_readahead": 2}
"""A few files at a time: images are large."""
_COMMENTS = re.compile(r"(\s+|--[^\n]*(\n|$)|/\*.*?\*/)*", re.DOTALL)
_EXPLAIN = re.compile(r"explain\b(\s+analyze\b|\s*\([^()]*\))?", re.IGNORECASE)
_ASKS = ("select", "with", "from", "values", "table", "describe", "desc", "show", "summarize")
_MISSING = re.compile(r"(column named|column|table with name)\s+\"?([^\"\s!]+)", re.IGNORECASE)

T = TypeVar("T")


def view_name(encoder: str) -> str:
    """Name of the view of one encoder's embeddings: its id, with _ for all but letters and digits."""
    return "embeddings_" + re.sub(r"[^A-Za-z0-9]", "_", encoder)


class Database:
    """A workspace's tables as they are now, for queries. As a context manager."""

    def __init__(self, workspace: Workspace, memory: int | None = None) -> None:
        """``memory``: most bytes that DuckDB itself takes; what is more goes to a temporary folder where it can."""
        self._spill = tempfile.TemporaryDirectory(prefix="clipmill-sql-")
        self.memory = memory
        self._views = {name: _view(workspace, name, None) for name in TABLES}
        self.encoders = {view_name(e): e for e in _dims(workspace)}
        """View -> encoder."""
        self._views |= {view: _view(workspace, "embeddings", encoder) for view, encoder in self.encoders.items()}
        self._db = self._connect()
        for name, view in self._views.items():
            self._db.register(name, view)
        # From here on neither files nor settings can be reached by any query. (Not before: the folder is a setting.)
        self._db.execute("SET enable_external_access = false; SET lock_configuration = true")

    def _connect(self) -> duckdb.DuckDBPyConnection:
        config: dict[str, Any] = {
            "temp_directory": self._spill.name, "python_enable_replacements": False,
            "autoinstall_known_extensions": False, "autoload_known_extensions": False,
        }  # fmt: skip
        if self.memory is not None:
            config["memory_limit"] = f"{self.memory}B"
        try:
            db = duckdb.connect(":memory:", config=config)
            db.execute("SET TimeZone = 'UTC'")
        except duckdb.Error as exc:
            raise UsageError("DuckDB cannot start", actual=_first_line(exc), remedy="give it more --memory") from exc
        return db

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._db.close()
        self._spill.cleanup()

    def columns(self) -> dict[str, dict[str, str]]:
        """View -> column -> its SQL type."""
        relations = {name: self._db.sql(f'SELECT * FROM "{name}"') for name in self._views}  # noqa: S608
        return {n: {c: str(t) for c, t in zip(r.columns, r.types, strict=True)} for n, r in relations.items()}

    def ask(self, query: str) -> Any:
        """The relation that one question makes: not yet run. To be called, and read, inside :meth:`run`.

        Raises:
            UsageError: no SQL, no question, or more than one.
        """
        self._require_question(query)
        (statement,) = self._db.extract_statements(query)
        return self._db.sql(statement)

    def read(self, relation: Any, rows: int) -> tuple[pa.Schema, Generator[pa.RecordBatch, None, None]]:
        """Run it: its schema, and its rows as a stream of at most ``rows`` at a time. Raises what :meth:`run` does."""
        reader = relation.to_arrow_reader(rows)

        def batches() -> Generator[pa.RecordBatch, None, None]:
            try:
                with reader:
                    yield from reader
            except (pa.ArrowException, OSError) as exc:
                raise self._explained(exc) from exc

        return reader.schema, batches()

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, done in a thread of its own: Ctrl-C stops the query that it runs.

        Raises:
            UsageError: the query cannot be answered, with the nearest column or table where a name is wrong.
            ClipmillError: it needs more memory than it has, or a file cannot be read.
        """
        with ThreadPoolExecutor(1, "sql") as pool:
            future = pool.submit(work)
            try:
                return future.result()
            except duckdb.Error as exc:
                raise self._explained(exc) from exc
            except BaseException:
                self._stop(future)
                raise

    def _stop(self, future: Future[T]) -> None:
        """A query that has just begun to run may miss one interrupt."""
        while not future.done():
            self._db.interrupt()
            try:
                future.exception(timeout=0.1)
            except NotYet:
                continue

    def _require_question(self, query: str) -> None:
        """Refuse all but one statement that asks. (Nothing could be written, or read elsewhere, by another one.)"""
        text = _uncommented(query)
        asked = _uncommented(_EXPLAIN.sub("", text, count=1)) if _EXPLAIN.match(text) else text
        word = re.match(r"\(*\s*(\w*)", asked)
        statements: Sequence[Any] = ()
        if word and word[1].lower() in _ASKS:
            try:
                statements = self._db.extract_statements(asked)
            except duckdb.Error as exc:
                raise self._explained(exc) from exc
        if [str(s.type).rpartition(".")[2] for s in statements] != ["SELECT"]:
            raise UsageError(
                "this is no single question",
                expected="one SELECT, WITH, DESCRIBE, SUMMARIZE or EXPLAIN",
                actual=f"{len(statements)} statements" if len(statements) > 1 else _shortened(query) or "nothing",
                remedy="sql only reads; the jobs write",
            )

    def _explained(self, exc: Exception) -> ClipmillError:
        """What to tell a user of DuckDB's error."""
        for view in self._views.values():
            if view.failure is not None:
                return view.failure
        if isinstance(exc, duckdb.OutOfMemoryException) or "Out of Memory" in str(exc):
            return ClipmillError(
                "the query needs more memory than it has",
                expected=f"{self.memory:,} bytes" if self.memory else "DuckDB's own limit",
                actual=_first_line(exc),
                remedy="ask for more with --memory, or for fewer rows",
            )
        wrong = _MISSING.search(str(exc))
        names = {name for view in self._views.values() for name in view.schema.names}
        known = sorted(self._views if wrong and wrong[1].lower().startswith("table") else names)
        near = difflib.get_close_matches(wrong[2].rpartition(".")[2], known, n=1) if wrong else []
        return UsageError(
            "the query cannot be answered",
            actual=_first_line(exc),
            remedy=f"did you mean {near[0]}?" if near else "clipmill sql without a query lists tables and columns",
        )


class _View(ds.InMemoryDataset):  # type: ignore[misc]
    """A table as DuckDB is to see it, itself without rows: they are read when DuckDB asks for a scan of some columns.

    DuckDB hands its comparisons on to Arrow, which must drop all other rows. Arrow's own way with them reads the
    statistics of the files, and cannot compare a text with those that delta-rs leaves when it rewrites a file (merge,
    compaction). So only numbers are left to that way, which skips files by their keys; the rest is compared here.
    """

    def __init__(self, stored: ds.Dataset, dims: Mapping[str, int | None], encoder: str | None) -> None:
        """``dims``: vector columns and their D, None where it is not the same in all rows."""
        self._stored, self._dims = stored, dims
        self._own = None if encoder is None else pc.field("encoder") == encoder
        self.failure: ClipmillError | None = None
        """Why a scan broke off: DuckDB passes on only the text."""
        fields = [pa.field(f.name, _shown(dims[f.name])) if f.name in dims else f for f in stored.schema]
        super().__init__(pa.schema(fields).empty_table())

    def scanner(
        self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None, **_options: Any
    ) -> _Scanner:
        names = self.schema.names if columns is None else list(columns)
        own = self._own if filter is None else filter if self._own is None else self._own & filter
        schema = pa.schema([self.schema.field(n) for n in names])
        return _Scanner(pa.RecordBatchReader.from_batches(schema, self._batches(names, own)))

    def _batches(self, names: list[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._rows(names, where):
                shown = batch
                for i, name in enumerate(names):
                    if name in self._dims:
                        floats = _floats(batch.column(i), self._dims[name], name)
                        shown = shown.set_column(i, self.schema.field(name), floats)
                yield shown
        except ClipmillError as exc:
            self.failure = exc
            raise
        except (OSError, pa.ArrowInvalid) as exc:
            self.failure = ClipmillError(
                "a file of the table cannot be read", actual=str(exc), remedy="it may have been vacuumed: ask again"
            )
            raise

    def _rows(self, names: list[str], where: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        """These columns of the rows for which ``where`` is true, as they are stored."""
        schema = self._stored.schema
        used = [] if where is None else [n for n in schema.names if n in str(where)]  # or named like one: no harm
        if not any(_is_bytes(schema.field(n).type) for n in used):
            yield from self._stored.to_batches(columns=names, filter=where, **_READ_AHEAD)
            return
        # Images and vectors are read only of files in which there is something to be found.
        wide = any(pa.types.is_binary(schema.field(n).type) for n in names if n not in used)
        for part in _files(self._stored) if wide else [self._stored]:
            if wide and not any(_only(b, where).num_rows for b in part.to_batches(columns=used, **_READ_AHEAD)):
                continue
            for batch in part.to_batches(columns=list(dict.fromkeys([*names, *used])), **_READ_AHEAD):
                yield from _only(batch, where).select(names).to_batches()


class _Scanner:
    """As much of a ``pyarrow.dataset.Scanner`` as DuckDB asks for."""

    def __init__(self, reader: pa.RecordBatchReader) -> None:
        self._reader = reader

    def to_reader(self) -> pa.RecordBatchReader:
        return self._reader


def _dims(workspace: Workspace) -> dict[str, int]:
    """Encoder -> D, of every encoder that the workspace has a card of."""
    return {name: read_card(workspace, name).dim for name in embedded_encoders(workspace)}


def _view(workspace: Workspace, table: str, encoder: str | None) -> _View:
    """A table, or its rows of one encoder."""
    stored = workspace.table(table).dataset()
    if table != "embeddings":
        return _View(stored, {}, None)
    dims = _dims(workspace)
    known = {dims[encoder]} if encoder else set(dims.values())
    dim = known.pop() if len(known) == 1 else None
    return _View(stored, dict.fromkeys(VECTORS.values(), dim), encoder)


def _files(stored: ds.Dataset) -> Iterator[ds.Dataset]:
    """Each file of a dataset as one."""
    if not isinstance(stored, ds.FileSystemDataset):  # there is no table, and no row
        return
    for fragment in stored.get_fragments():
        yield ds.FileSystemDataset([fragment], stored.schema, stored.format, stored.filesystem)


def _only(batch: pa.RecordBatch, where: pc.Expression | None) -> pa.Table:
    return pa.Table.from_batches([batch]).filter(where)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _shown(dim: int | None) -> pa.DataType:
    return pa.list_(pa.float32()) if dim is None else pa.list_(pa.float32(), dim)


def _floats(column: pa.Array, dim: int | None, name: str) -> pa.Array:
    """binary[N], float16 as stored -> FLOAT[D] of each row; null stays null.

    Raises:
        SchemaError: a vector of another length than D; an odd number of bytes.
    """
    filled = column.fill_null(bytes(2 * (dim or 0)))
    if len(filled) == 0:
        return pa.array([], _shown(dim))
    _, offsets, data = filled.buffers()
    ends = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1]
    widths = np.diff(ends)
    if (widths % 2 if dim is None else widths != 2 * dim).any():
        raise SchemaError(
            f"embeddings.{name} holds vectors of another length",
            expected="an even number of bytes" if dim is None else f"{2 * dim} bytes (D={dim}) in every row",
            actual=f"lengths {sorted(set(widths.tolist()))[:5]}",
            remedy="ask the view of one encoder: clipmill sql without a query lists them",
        )
    count = int(ends[-1] - ends[0]) // 2
    values = np.frombuffer(data, "<f2", count, int(ends[0])) if count else np.empty(0, np.float16)
    floats = pa.array(values.astype(np.float32))
    missing = column.is_null() if column.null_count else None
    if dim is None:
        return pa.ListArray.from_arrays(pa.array((ends - ends[0]) // 2, pa.int32()), floats, mask=missing)
    return pa.FixedSizeListArray.from_arrays(floats, dim, mask=missing)


def _uncommented(text: str) -> str:
    """Without what stands before the first word."""
    found = _COMMENTS.match(text)
    return text[found.end() if found else 0 :]


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]


def _shortened(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:80]
