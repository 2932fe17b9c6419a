"""Many questions of one kind (texts, keys or vectors), searched a shard at a time: a Parquet file each."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from pipeline.collection.collection import Collection
from pipeline.collection.terms import CANCELLED
from pipeline.storage import storage_error, write_atomic
from schemas.questions import Question
from schemas.vectors import normalise

Vectors = NDArray[np.float32]
Values = list[str | None] | NDArray[Any]

BLOCK = 256
"""Questions encoded and searched at once. How sums are rounded depends on what is computed together: blocks begin at
multiples of this, whatever the shards, so that the results are the same."""
_ERROR = pa.field("error", pa.string())


@dataclass(frozen=True)
class Shard:
    """Questions ``first``, ``first + 1``, ... of all: texts, keys int64 [n] or vectors [n, D]."""

    number: int
    first: int
    values: Values

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Answered:
    """What became of a shard's questions. A failed one has one row, without a rank, with an error."""

    number: int
    questions: int
    failed: int
    rows: int


class BulkSearch:
    """Searches shards of questions and writes the results as Parquet files into a folder.

    A row a result: ``number`` of the question, ``query`` in words, those of :class:`~pipeline.collection.Results`,
    ``error``.

    Args:
        place: workspace, encoder and version of the index.
        settings: of every question; its terms, texts, are added to each.
        folder: where the files go.
    """

    def __init__(self, place: tuple[str, str, str], settings: Question, folder: str) -> None:
        workspace, encoder, version = place
        self._collection = Collection(workspace, encoder, version=version, verify=False)  # the driver has verified it
        self._settings, self._folder = settings, folder
        weights = np.array([term.weight for term in settings.terms], np.float32)
        texts = [term.text or "" for term in settings.terms]
        self._beside = weights @ self._collection.encode_texts(texts) if texts else np.float32(0)
        self._weight = float(np.abs(weights).sum())

    def __call__(self, shard: Shard) -> Answered:
        tables, failed = [], 0
        for start in range(0, len(shard), BLOCK):
            table, errors = self._block(shard.first + start, shard.values[start : start + BLOCK])
            tables.append(table)
            failed += errors
        table = pa.concat_tables(tables)
        data = io.BytesIO()
        pq.write_table(table, data, compression="zstd")
        path = part(self._folder, shard.number)
        try:
            write_atomic(path, data.getvalue())
        except OSError as exc:
            raise storage_error(exc, str(path)) from exc
        return Answered(shard.number, len(shard), failed, table.num_rows)

    def _block(self, first: int, values: Values) -> tuple[pa.Table, int]:
        """The rows of some questions, and how many of these failed."""
        vectors, errors = self._vectors(values)
        asked = np.setdiff1d(np.arange(len(values)), np.array(list(errors), np.int64))
        table, question = self._search(vectors[asked])
        words = pa.array([_words(value, first + i) for i, value in enumerate(values)], pa.string())
        own = asked[question]  # of each row the question that it answers
        table = table.add_column(0, "query", words.take(pa.array(own)))
        table = table.add_column(0, "number", pa.array(first + own))
        table = table.append_column(_ERROR, pa.nulls(table.num_rows, pa.string()))
        if errors:
            wrong = np.array(list(errors), np.int64)
            told = {"number": pa.array(first + wrong), "query": words.take(pa.array(wrong))}
            told["error"] = pa.array(list(errors.values()), pa.string())
            columns = [told.get(f.name, pa.nulls(len(wrong), f.type)) for f in table.schema]
            table = pa.concat_tables([table, pa.table(columns, schema=table.schema)])
            table = table.sort_by([("number", "ascending"), ("rank", "ascending")])
        return table, len(errors)

    def _search(self, vectors: Vectors) -> tuple[pa.Table, NDArray[np.int64]]:
        """Rows of results, and to which of the vectors [n, D] each of them belongs."""
        settings, collection = self._settings, self._collection
        k = collection.over_fetch(settings)
        similarity, keys = collection.search_vectors(vectors, k, settings.modality, settings.where)
        if settings.unique is None and settings.diversity == 0:
            if settings.threshold is not None:
                keys = np.where(similarity >= settings.threshold, keys, -1)
            table, there = collection.table(similarity, keys)
            return table, np.nonzero(there)[0]
        found = [collection.finish(settings, *one).table for one in zip(vectors, similarity, keys, strict=True)]
        empty = collection.table(similarity[:0], keys[:0])[0]
        return pa.concat_tables([empty, *found]), np.repeat(np.arange(len(found)), [t.num_rows for t in found])

    def _vectors(self, values: Values) -> tuple[Vectors, dict[int, str]]:
        """Unit-norm vectors [n, D], and which questions have none, and why."""
        own, errors = self._own(values)
        total = normalise(own) + self._beside
        length = np.linalg.norm(total, axis=1)
        for i in np.flatnonzero(length <= CANCELLED * (1 + self._weight)).tolist():
            errors.setdefault(i, "the terms cancel each other out")
        return total / np.maximum(length, 1e-12)[:, None], dict(sorted(errors.items()))

    def _own(self, values: Values) -> tuple[Vectors, dict[int, str]]:
        collection = self._collection
        if isinstance(values, list):
            vectors = np.zeros((len(values), collection.dim), np.float32)
            there = [i for i, text in enumerate(values) if text and text.strip()]
            if there:
                vectors[there] = collection.encode_texts([values[i] or "" for i in there])
            return vectors, dict.fromkeys(sorted(set(range(len(values))) - set(there)), "the text is empty")
        if values.ndim == 1:
            vectors, known = collection.own_vectors(values, self._settings.modality)
            return vectors, dict.fromkeys(np.flatnonzero(~known).tolist(), "there is no such pair in the index")
        vectors = np.asarray(values, np.float32)
        usable = np.asarray(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
        wrong = np.flatnonzero(~usable).tolist()
        return np.where(usable[:, None], vectors, 0), dict.fromkeys(wrong, "the vector is not finite, or all 0")


def part(folder: str, number: int) -> UPath:
    """The file of a shard."""
    return UPath(folder) / f"part-{number:06d}.parquet"


def _words(value: object, number: int) -> str | None:
    """A question in words: a text or a key itself, of a vector its number."""
    return str(number) if isinstance(value, np.ndarray) else None if value is None else str(value)
