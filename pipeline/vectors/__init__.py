"""Reading vectors: of a whole table, a range of keys, a filter or a rank's share, into NumPy.

Memory is one matrix [N, D] and the keys. Files are read in threads, from the memory map where they are local; where
the bytes lie as ``pipeline.tables`` writes them they are copied once, from the file into the matrix, with no decoder
between: see :mod:`pipeline.vectors.pages`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TypedDict, Unpack

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from upath import UPath

from pipeline.keys import Keys
from pipeline.tables import Table
from pipeline.vectors.pages import NotPlain, plain_values
from pipeline.vectors.plan import (
    Filter,
    Group,
    Places,
    Source,
    batched,
    matching,
    open_source,
    share,
    survey,
    with_keys,
)
from schemas.cards import EncoderCard
from schemas.errors import NothingToDo, UsageError, WorkspaceError
from schemas.vectors import unpack

Vectors = NDArray[np.float16]
BATCH = 65_536
_THREADS = min(16, max(2, os.cpu_count() or 1))


class Which(TypedDict, total=False):
    """Which rows, and of which version of the table. Without any: all rows of the newest.

    ``keys``: from the first up to, but not including, the second. ``among``: these keys, sorted. ``where``: an SQL
    predicate over the table's columns but the vectors. ``paths``: files, as the table's log names them. ``rank`` of
    ``world``: shares that are disjoint, complete and differ by one row at most. ``dim``: D; by default the encoder's
    card in the workspace says.
    """

    keys: tuple[int, int] | None
    among: Keys | None
    where: str | None
    paths: Collection[str] | None
    rank: int
    world: int
    version: int | None
    dim: int | None


def read_vectors(
    table: Table,
    encoder: str,
    modality: str = "image",
    *,
    ordered: bool = False,
    into: str | None = None,
    **which: Unpack[Which],
) -> tuple[Keys, Vectors]:
    """Keys int64 [N] and unit-norm vectors float16 [N, D] of one encoder, in the table's order.

    The order of a version is always the same. Rows without a vector of this modality are left out.

    Args:
        modality: ``image`` or ``text``.
        ordered: by key.
        into: a local file to make; the vectors are mapped from it and need no memory of their own.

    Raises:
        NothingToDo: the table has no vectors of this encoder and modality.
        SchemaError: a vector of another width than D.
        UsageError: ``where`` is no predicate, or there is no such rank.
    """
    with _reading(table), ThreadPoolExecutor(_THREADS) as pool:
        source, groups, dim = _plan(pool, table, (encoder, modality), which, keys=which.get("world", 1) == 1)
        return _gather(pool, source, groups, dim, ordered=ordered, into=into)


def vector_batches(
    table: Table, encoder: str, modality: str = "image", *, size: int = BATCH, **which: Unpack[Which]
) -> Iterator[tuple[Keys, Vectors]]:
    """What :func:`read_vectors` gives, as a stream of ``size`` rows at a time, in the table's order.

    Memory is one batch, and a few bytes for each row group.
    """
    with _reading(table), ThreadPoolExecutor(_THREADS) as pool:
        source, groups, dim = _plan(pool, table, (encoder, modality), which, keys=False)
        for some in batched(groups, size):
            yield _gather(pool, source, some, dim)


def read_keys(table: Table, encoder: str, modality: str = "image", **which: Unpack[Which]) -> Keys:
    """The keys alone, int64 [N], in the order of :func:`read_vectors`."""
    with _reading(table), ThreadPoolExecutor(_THREADS) as pool:
        source, groups, _ = _plan(pool, table, (encoder, modality), which, keys=which.get("world", 1) == 1)
        return _keys(with_keys(pool, source, groups))


def card_dim(table: Table, encoder: str) -> int | None:
    """D as the encoder's card in the table's workspace says, None where there is no card."""
    path = UPath(table.uri).parent.parent / "encoders" / f"{encoder}.json"
    return EncoderCard.from_json(path.read_text(), str(path)).dim if path.exists() else None


def _plan(
    pool: Executor, table: Table, what: tuple[str, str], which: Which, *, keys: bool
) -> tuple[Source, list[Group], int]:
    """The wanted rows, and D."""
    encoder, modality = what
    rank, world = which.get("rank", 0), which.get("world", 1)
    if not 0 <= rank < world:
        raise UsageError(f"there is no rank {rank} of {world}", expected="0 <= rank < world")
    dim = which.get("dim") or card_dim(table, encoder)
    source = open_source(table, what, which.get("version"), None if dim is None else 2 * dim, which.get("paths"))
    wanted = Filter(which.get("keys"), which.get("among"))
    found = [] if source is None else list(pool.map(partial(survey, source, wanted, keys=keys), source.paths))
    known = next((group for group, _ in found if group is not None), None)
    if source is None or known is None:
        raise NothingToDo(
            f"no {modality} vectors of {encoder}",
            expected=f"rows of it in {table.uri}",
            remedy="clipmill embed first",
        )
    groups = [group for _, some in found for group in some]
    if (where := which.get("where")) is not None:
        wide = replace(source, schema=pa.schema(table.columns()))
        groups = matching(pool, wide, groups, where)
    return source, groups if world == 1 else share(groups, rank, world), dim or _dim(source, known)


def _dim(source: Source, group: Group) -> int:
    """D of the first vector of a row group."""
    (_, _, column) = next(_decoded(source, group.part(0, 1)))
    return len(column[0].as_buffer()) // 2


def _gather(
    pool: Executor, source: Source, groups: Sequence[Group], dim: int, *, ordered: bool = False, into: str | None = None
) -> tuple[Keys, Vectors]:
    """The wanted rows of some row groups."""
    groups = with_keys(pool, source, groups)
    keys = _keys(groups)
    places: Places = range(len(keys))
    if ordered and (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys, kind="stable")
        places = np.empty(len(keys), np.int64)
        places[order] = np.arange(len(keys))
        keys = keys[order]
    shape = (len(keys), dim)
    vectors = _matrix(shape, into)
    out = vectors.view(np.uint8)  # [N, 2D]
    ends = np.cumsum([0, *map(len, groups)]).tolist()
    parts = [places[first:last] for first, last in pairwise(ends)]
    for _ in pool.map(partial(_fill, source, out), groups, parts):
        pass
    return keys, vectors


def _matrix(shape: tuple[int, int], into: str | None) -> Vectors:
    if into is None or 0 in shape:
        return np.empty(shape, "<f2")
    mapped: Vectors = np.memmap(into, "<f2", "w+", shape=shape)
    return mapped


def _keys(groups: Sequence[Group]) -> Keys:
    return np.concatenate([np.empty(0, np.int64), *(g.keys for g in groups if g.keys is not None)])


def _fill(source: Source, out: NDArray[np.uint8], group: Group, places: Places) -> None:
    """Copy a row group's wanted vectors to their places in ``out`` [N, 2D].

    Raises:
        SchemaError: one of another width.
    """
    pages = _plain(source, group, out.shape[1])
    if pages is None:
        for begin, end, column in _decoded(source, group):
            out[_index(places[begin:end])] = unpack(column, out.shape[1] // 2).view(np.uint8)
        return
    first = 0
    for page in pages:
        begin, end, inside = _within(group.rows, first, len(page))
        first += len(page)
        if begin < end:
            out[_index(places[begin:end])] = page[_index(inside)]


def _plain(source: Source, group: Group, width: int) -> list[NDArray[np.uint8]] | None:
    """All vectors of a row group as views [n, 2D] of the file, or None where Arrow has to decode them."""
    if group.chunk is None:
        return None
    try:
        return plain_values(source.chunk(group.path, group.chunk), group.size, width, nullable=group.nullable)
    except NotPlain:
        return None


def _decoded(source: Source, group: Group) -> Iterator[tuple[int, int, pa.Array]]:
    """The wanted vectors as Arrow reads them, some at a time: from which to which of the wanted, and these."""
    first = 0
    for batch in source.batches(group.path, group.number, [source.column]):
        begin, end, inside = _within(group.rows, first, batch.num_rows)
        first += batch.num_rows
        if begin < end:
            column = batch.column(0)
            whole = isinstance(inside, range)
            yield begin, end, column.slice(inside[0], end - begin) if whole else column.take(pa.array(inside))


def _within(rows: Places, first: int, count: int) -> tuple[int, int, Places]:
    """Of the wanted rows those among ``count`` rows from ``first`` on: from which to which, and where in these."""
    if isinstance(rows, range):
        low, high = (min(max(at, rows.start), rows.stop) for at in (first, first + count))
        return low - rows.start, high - rows.start, range(low - first, high - first)
    begin, end = np.searchsorted(rows, [first, first + count]).tolist()
    return begin, end, rows[begin:end] - first


def _index(places: Places) -> slice | Keys:
    return slice(places.start, places.stop) if isinstance(places, range) else places


@contextmanager
def _reading(table: Table) -> Iterator[None]:
    """A file that is gone or damaged, as an error that says so."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as exc:
        raise WorkspaceError(
            f"cannot read the vectors of {table.uri}",
            actual=str(exc),
            remedy="do not vacuum while a job runs; run it again",
        ) from exc
