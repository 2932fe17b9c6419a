"""The records of an index version, opened: rows, vectors and filters by key, from the memory map."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from upath import UPath

from pipeline.keys import Keys
from pipeline.predicate import matching_values, named_columns
from pipeline.records.files import check, local_file, mapped
from pipeline.records.pictures import pictures
from pipeline.records.rows import Places, Rows, widened
from pipeline.workspace import Workspace
from schemas.cards import Segment
from schemas.errors import CardError, UsageError
from schemas.records import FILE, VECTORS

Vectors = NDArray[np.float16]

_THREADS = min(8, os.cpu_count() or 1)
_KEPT_BYTES = 128 << 20
"""Of predicates' keys."""
_PLACE = "__place"


class Records:
    """What is known of every pair of an index version, by key. Thread-safe; no row is in memory before it is asked for.

    A key whose newest row has no vector at all is gone: nothing here speaks of it.

    Attributes:
        keys: sorted, int64 [N].
        dim: D of the vectors.
        columns: what can be taken and filtered by: all but vectors and files.
        schema: of all columns.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.schema = pa.unify_schemas([batch.schema for batch in batches])
        self._rows = Rows([widened(batch, self.schema) for batch in batches], self.schema)
        if any(b.column("image_vec").null_count and b.column("text_vec").null_count for b in self._rows.batches):
            self._rows.leave_out(~(self._there("image") | self._there("text")))
        self.keys = self._rows.keys
        self.columns = [n for n in self.schema.names if n not in (*VECTORS.values(), FILE)]
        self.dim = int(self.schema.field(VECTORS["image"]).type.byte_width) // 2
        self._views = {m: [_view(b.column(c)) for b in self._rows.batches] for m, c in VECTORS.items()}
        self._having: dict[str, Keys] = {}
        self._kept: OrderedDict[str, Keys] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def open(cls, folder: UPath, segments: Sequence[Segment], verify: bool = True) -> Records:
        """Map segments, newest last, of the encoder's folder of indices.

        Args:
            verify: compare every byte with the cards' sha256, in threads. Sizes are compared in any case.

        Raises:
            CardError: there is no segment, or one is missing, truncated, changed or does not fit the others.
        """
        if not segments:
            raise CardError(
                f"the index in {folder} has no records",
                expected="a version built with its records",
                remedy="build it again: clipmill index --rebuild",
            )
        with ThreadPoolExecutor(_THREADS) as pool:
            files = list(pool.map(lambda s: local_file(folder / s.path, s), segments))
            if verify:
                list(pool.map(check, files, segments))
        try:
            return cls([batch for file in files for batch in mapped(file)])
        except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as exc:
            raise CardError(
                f"the segments of records in {folder} do not fit together",
                actual=str(exc),
                remedy="build the index again: clipmill index --rebuild",
            ) from exc

    def __len__(self) -> int:
        return len(self.keys)

    def known(self, keys: Keys) -> NDArray[np.bool_]:
        """Which of these keys [n] have a record."""
        return self._rows.find(np.asarray(keys, np.int64))[1]

    def has(self, modality: str) -> Keys:
        """The keys that have a vector of this modality, sorted."""
        if modality not in self._having:
            there = self._there(modality)[self._rows.places]
            self._having[modality] = self.keys if there.all() else self.keys[there]
        return self._having[modality]

    def vectors(self, keys: Keys, modality: str) -> Vectors:
        """float16 [n, D], the vectors of keys [n] in their order.

        Raises:
            UsageError: a key that is not there, or has no vector of this modality.
        """
        keys = np.asarray(keys, np.int64)
        column, out = VECTORS[modality], np.empty((len(keys), self.dim), "<f2")
        for number, own, inside in self._rows.split(self._places(keys)):
            vectors = self._rows.batches[number].column(column)
            if vectors.null_count:
                there = np.asarray(vectors.is_valid())[inside]
                if not there.all():
                    raise UsageError(f"the pair {keys[own[~there][0]]} has no {modality} vector")
            out[own] = self._views[modality][number][inside]
        return out

    def take(self, keys: Keys, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of keys [n] in their order; by default all columns but vectors and files.

        Raises:
            UsageError: a key or a column that is not there.
        """
        names = self.columns if columns is None else list(columns)
        if unknown := [n for n in names if n not in self.schema.names]:
            raise UsageError("no such columns", expected=", ".join(self.columns), actual=", ".join(unknown))
        return self._rows.take(self._places(np.asarray(keys, np.int64)), names)

    def matching(self, predicate: str, seconds: float = 10.0) -> Keys:
        """The keys for which an SQL predicate over :attr:`columns` is true, sorted; remembered for the next time.

        Raises:
            UsageError: it is no such predicate, it reaches outside, or it takes longer than ``seconds``.
        """
        with self._lock:
            if predicate in self._kept:
                self._kept.move_to_end(predicate)
                return self._kept[predicate]
        names = named_columns(predicate, self.columns)
        batches = [b.select(["pair_key", *(n for n in names if n != "pair_key")]) for b in self._rows.batches]
        table = pa.Table.from_batches(batches)
        if len(self.keys) == self._rows.total:
            keys = matching_values(table, predicate, "pair_key", known=self.columns, seconds=seconds, strict=True)
        else:  # rows that later ones took the place of do not count
            table = table.append_column(_PLACE, pa.array(np.arange(table.num_rows)))
            places = matching_values(table, predicate, _PLACE, known=self.columns, seconds=seconds, strict=True)
            passed = np.zeros(table.num_rows, np.bool_)
            passed[places] = True
            keys = self.keys[passed[self._rows.places]]
        keys = np.sort(keys)
        keys.flags.writeable = False
        with self._lock:
            self._kept[predicate] = keys
            while len(self._kept) > 1 and sum(k.nbytes for k in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return keys

    def images(self, workspace: Workspace, keys: Keys) -> dict[int, bytes]:
        """The stored images of keys, encoded. Those without a record, or without an image by now, are left out."""
        keys = np.asarray(keys, np.int64)
        keys = np.unique(keys[self.known(keys)])
        files = np.array(self.take(keys, [FILE])[FILE].to_pylist(), object)
        by_file = {file: keys[files == file] for file in set(files.tolist()) if file is not None}
        found = dict(pictures(workspace.table("images"), by_file))
        return {key: image for key, image in found.items() if image is not None}

    def _there(self, modality: str) -> NDArray[np.bool_]:
        """Which rows have a vector of this modality, of all rows."""
        columns = [b.column(VECTORS[modality]) for b in self._rows.batches]
        return np.concatenate([np.empty(0, np.bool_), *(np.asarray(column.is_valid()) for column in columns)])

    def _places(self, keys: Keys) -> Places:
        places, known = self._rows.find(keys)
        if not known.all():
            missing = keys[~known]
            raise UsageError(
                f"{len(missing)} keys have no record" if len(missing) > 1 else f"there is no pair {missing[0]}",
                expected=f"keys of the {len(self.keys):,} pairs in the index",
                actual=", ".join(map(str, missing[:5].tolist())),
            )
        return places


def _view(column: pa.Array) -> Vectors:
    """The vectors of a column as they lie in the file, float16 [n, D]; of a null whatever is there."""
    width = column.type.byte_width
    if not len(column):
        return np.empty((0, width // 2), "<f2")
    data = np.frombuffer(column.buffers()[1], "<f2")
    first = column.offset * width // 2
    return data[first : first + len(column) * width // 2].reshape(len(column), width // 2)
