"""Rows of the tables embeddings, images and pairs, joined by key into records, as a stream.

Memory: the keys, and one batch. What the records say beside their vectors lies in a temporary file meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.keys import Keys, among, minus, union
from pipeline.records.files import mapped
from pipeline.records.rows import Rows
from pipeline.tables import Table
from pipeline.vectors import read_vectors
from pipeline.workspace import Workspace
from schemas.errors import NothingToDo
from schemas.records import FILE, VECTORS, records_schema
from schemas.vectors import unpack

ROWS = 32_768
"""Rows of a record batch, about: with D = 512 and both vectors 64 MiB."""
_PICKED = 131_072
"""Keys up to which vectors are picked by key; for more, files are read from their beginning to their end."""
_TOLD = pa.schema(
    [
        ("pair_key", pa.int64()), ("caption", pa.string()), ("url", pa.string()), ("width", pa.int32()),
        ("height", pa.int32()), (FILE, pa.string()),
    ]
)  # fmt: skip
_FROM = {"images": ["pair_key", "caption", "url", "width", "height"], "pairs": ["pair_key", "caption", "url"]}


@dataclass(frozen=True)
class _Source:
    """One encoder's rows of embeddings: of a version, in these files, and of ``wanted`` (sorted keys) alone."""

    table: Table
    version: int | None
    encoder: str
    dim: int
    wanted: Keys | None
    paths: set[str]

    def rows(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        batches = self.table.batches(["pair_key", "encoder", *columns], self.version, self.paths)
        return gathered((_of(batch, self.encoder, self.wanted) for batch in batches), ROWS)


def record_batches(
    workspace: Workspace,
    encoder: str,
    dim: int,
    keys: Keys | None = None,
    versions: Mapping[str, int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The records of one encoder's embeddings (see ``schemas.records``), in the order of the table's files.

    Caption, URL and size are those of images, else of pairs (vectors that were imported may have no image).

    Args:
        dim: D of its vectors.
        keys: of these alone, in any order; those without an embedding are passed over. A few are found without
            reading the other rows' vectors.
        versions: of the tables, by name; without, the newest.

    Raises:
        SchemaError: a vector of another width than D.
    """
    versions = versions or {}
    table, version = workspace.table("embeddings"), versions.get("embeddings")
    wanted = None if keys is None else union(np.asarray(keys, np.int64))
    own, paths = _own(table, version, encoder, wanted)
    if not len(own):
        return
    source = _Source(table, version, encoder, dim, wanted, paths)
    further = _further(table, version)
    narrow = ["caption", "similarity", *further.names]
    with tempfile.TemporaryDirectory(prefix="clipmill-records-") as scratch:
        told = _told(workspace, own, versions, f"{scratch}/told.arrow")
        few = wanted is not None and len(own) <= _PICKED
        batches = _picked(source, own, narrow) if few else source.rows([*narrow, *VECTORS.values()])
        for batch in batches:
            yield _records(batch, told, records_schema(dim, further), dim)


def gone_batch(keys: Keys, dim: int) -> pa.RecordBatch:
    """Rows of records without any vector: they take the place of the rows of keys that are no longer there."""
    schema = records_schema(dim)
    rest = [pa.nulls(len(keys), field.type) for field in list(schema)[1:]]
    return pa.RecordBatch.from_arrays([pa.array(np.asarray(keys, np.int64)), *rest], schema=schema)


def gathered(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of about ``size``."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        for start in range(0, batch.num_rows, size):
            held.append(batch.slice(start, size))
            rows += held[-1].num_rows
            if rows >= size:
                yield _one(held)
                held, rows = [], 0
    if held:
        yield _one(held)


def _one(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


# -- embeddings ----------------------------------------------------------------------------------------


def _own(table: Table, version: int | None, encoder: str, wanted: Keys | None) -> tuple[Keys, set[str]]:
    """The encoder's keys (of ``wanted``), sorted, and the files that they are in."""
    files, batches = table.places(("pair_key", "encoder"), version)
    found, used = [np.empty(0, np.int64)], set()
    for batch in batches:
        mine = _of(batch, encoder, wanted)
        if mine.num_rows:
            found.append(mine.column("pair_key").to_numpy())
            used.add(int(mine.column(FILE)[0].as_py()))
    return np.sort(np.concatenate(found)), {files[number] for number in used}


def _of(batch: pa.RecordBatch, encoder: str, wanted: Keys | None) -> pa.RecordBatch:
    """The rows of this encoder (and with these sorted keys)."""
    mine = np.asarray(pc.fill_null(pc.equal(batch.column("encoder"), encoder), False))
    if wanted is not None:
        mine = mine & among(wanted, batch.column("pair_key").to_numpy())
    return batch if mine.all() else batch.filter(pa.array(mine))


def _further(table: Table, version: int | None) -> pa.Schema:
    """Columns that the table has beside its own (scores, labels), and a record has not already."""
    opened = table.open(version)
    there = set() if opened is None else {field.name for field in opened.schema().fields}
    taken = {*table.spec.schema.names, *records_schema(1).names}
    return pa.schema([(n, kind) for n, kind in table.columns().items() if n in there and n not in taken])


def _picked(source: _Source, own: Keys, narrow: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """:meth:`_Source.rows` with both vectors, of which only those of the sorted keys ``own`` are read."""
    vectors = {column: _vectors(source, own, modality) for modality, column in VECTORS.items()}
    for batch in source.rows(narrow):
        at = np.searchsorted(own, batch.column("pair_key").to_numpy())
        for name, column in vectors.items():
            batch = batch.append_column(name, column.take(pa.array(at)))  # noqa: PLW2901
        yield batch


def _vectors(source: _Source, own: Keys, modality: str) -> pa.Array:
    """The vectors of these sorted keys, fixed-size binary [n], null where there is none."""
    try:
        keys, vectors = read_vectors(
            source.table, source.encoder, modality,
            ordered=True, among=own, version=source.version, dim=source.dim,
        )  # fmt: skip
    except NothingToDo:  # vectors that were imported may be of one modality alone
        return pa.nulls(len(own), pa.binary(2 * source.dim))
    there = among(keys, own)
    rows = np.zeros((len(own), source.dim), "<f2")
    rows[there] = vectors
    return _fixed_size(rows, there)


# -- what is told beside -------------------------------------------------------------------------------


def _told(workspace: Workspace, keys: Keys, versions: Mapping[str, int], file: str) -> Rows:
    """What images, or else pairs, say of these sorted keys, in a file that is mapped."""
    missing = keys
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, _TOLD) as writer:
        for name, columns in _FROM.items():
            if not len(missing):
                break
            seen = [np.empty(0, np.int64)]
            table, version = workspace.table(name), versions.get(name)
            told = _lookup(table, version, columns, missing, few=len(missing) < table.count() // 10)
            for batch in gathered(told, ROWS):
                writer.write_batch(batch)
                seen.append(batch.column("pair_key").to_numpy())
            missing = minus(missing, union(*seen))
    return Rows(mapped(file), _TOLD)


def _lookup(
    table: Table, version: int | None, columns: Sequence[str], keys: Keys, *, few: bool
) -> Iterator[pa.RecordBatch]:
    """Rows with these sorted keys, with the name of their file. ``few``: look first which files have any at all."""
    paths = None
    if few:
        files, batches = table.places(("pair_key",), version)
        hits = (b for b in batches if among(keys, b.column("pair_key").to_numpy()).any())
        paths = {files[b.column(FILE)[0].as_py()] for b in hits}
    files, batches = table.places(columns, version, paths)
    names = pa.array(files, pa.string())
    for batch in batches:
        mine = among(keys, batch.column("pair_key").to_numpy())
        if not mine.any():
            continue
        some = batch if mine.all() else batch.filter(pa.array(mine))
        given = {name: some.column(name) for name in columns}
        if "width" in columns:  # of images, not of pairs: there it can be found again
            given[FILE] = names.take(some.column(FILE))
        arrays = [given[f.name].cast(f.type) if f.name in given else pa.nulls(some.num_rows, f.type) for f in _TOLD]
        yield pa.RecordBatch.from_arrays(arrays, schema=_TOLD)


# -- both ----------------------------------------------------------------------------------------------


def _records(rows: pa.RecordBatch, told: Rows, schema: pa.Schema, dim: int) -> pa.RecordBatch:
    """Rows of embeddings as records."""
    beside = _beside(rows.column("pair_key").to_numpy(), told)

    def column(name: str) -> pa.Array:
        if name == "caption":
            return pc.coalesce(rows.column(name), _whole(beside[name]))
        if name in VECTORS.values():
            return _fixed(rows.column(name), dim)
        return rows.column(name) if name in rows.schema.names else _whole(beside[name])

    return pa.RecordBatch.from_arrays([column(f.name).cast(f.type) for f in schema], schema=schema)


def _beside(keys: Keys, told: Rows) -> pa.Table:
    """What is told of keys, in their order; nulls where it is nothing."""
    places, known = told.find(keys)
    found = told.take(places[known], _TOLD.names)
    if known.all():
        return found
    nothing = pa.table([pa.nulls(1, field.type) for field in _TOLD], schema=_TOLD)
    at = np.where(known, np.cumsum(known) - 1, found.num_rows)
    return pa.concat_tables([found, nothing]).combine_chunks().take(pa.array(at))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fixed(column: pa.Array, dim: int) -> pa.Array:
    """binary -> fixed-size binary of 2*D bytes. Raises SchemaError for a vector of another width."""
    if pa.types.is_fixed_size_binary(column.type):
        return column
    if column.null_count == 0:
        return _fixed_size(unpack(column, dim), None)
    there = np.asarray(column.is_valid())
    rows = np.zeros((len(column), dim), "<f2")
    rows[there] = unpack(column.drop_null(), dim)
    return _fixed_size(rows, there)


def _fixed_size(vectors: NDArray[np.float16], there: NDArray[np.bool_] | None) -> pa.Array:
    """float16 [n, D] -> fixed-size binary [n], without a copy; null where it is not there."""
    data = pa.py_buffer(np.ascontiguousarray(vectors))
    bitmap = None if there is None or there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    return pa.Array.from_buffers(pa.binary(2 * vectors.shape[1]), len(vectors), [bitmap, data])
