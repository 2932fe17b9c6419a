"""Rows of record batches, taken by number or by key: the rest is neither copied nor looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.keys import Keys

Places = NDArray[np.int64]


class Rows:
    """Record batches of one schema as a long table of rows numbered from 0, found by their ``pair_key``.

    Of rows with the same key the last one counts. Memory: 16 bytes a row, beside the batches.

    Attributes:
        keys: all of them, sorted, int64 [N].
        places: the number of each one's row, int64 [N].
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> None:
        self.batches, self.schema = batches, schema
        self.starts = np.cumsum([0, *(b.num_rows for b in batches)])
        columns = [np.empty(0, np.int64), *(b.column("pair_key").to_numpy() for b in batches)]
        self.keys, self.places = _last_of_each(np.concatenate(columns))

    @property
    def total(self) -> int:
        """Rows in all, with those that later ones have taken the place of."""
        return int(self.starts[-1])

    def leave_out(self, rows: NDArray[np.bool_]) -> None:
        """Find these rows (bool [total]) no more."""
        there = ~rows[self.places]
        self.keys, self.places = self.keys[there], self.places[there]

    def find(self, keys: Keys) -> tuple[Places, NDArray[np.bool_]]:
        """The numbers of the rows of keys [n], and which of these are there at all."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.places[at], self.keys[at] == keys

    def split(self, places: Places) -> list[tuple[int, Places, Places]]:
        """By batch: its number, which of ``places`` are in it, and where in the batch those are."""
        if len(places) == 0:
            return []
        batch = np.searchsorted(self.starts, places, "right") - 1
        order = np.argsort(batch, kind="stable")
        ends = np.flatnonzero(np.diff(batch[order])) + 1
        found = []
        for own in np.split(order, ends):
            number = int(batch[own[0]])
            found.append((number, own, places[own] - self.starts[number]))
        return found

    def take(self, places: Places, columns: Sequence[str]) -> pa.Table:
        """Columns of the rows with these numbers, in their order, in one chunk."""
        parts, order = [], []
        for number, own, inside in self.split(places):
            parts.append(self.batches[number].select(columns).take(pa.array(inside)))
            order.append(own)
        schema = pa.schema([self.schema.field(name) for name in columns])
        table = pa.Table.from_batches(parts, schema).combine_chunks()
        if len(parts) < 2:
            return table
        back = np.empty(len(places), np.int64)
        back[np.concatenate(order)] = np.arange(len(places))
        return table.take(pa.array(back))


def _last_of_each(keys: Keys) -> tuple[Keys, Places]:
    """Sorted keys without doubles, and the number of each one's last row."""
    if (keys[1:] > keys[:-1]).all():
        return keys, np.arange(len(keys))
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    return ordered[last], order[last]


def widened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch with the columns of ``schema`` that it lacks, null: they came later."""
    if batch.schema.equals(schema):
        return batch
    there = batch.schema.names
    columns = [batch.column(f.name) if f.name in there else pa.nulls(batch.num_rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
