"""What an index is measured by, the same for everybody's: recall against exact search, milliseconds on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Keys = NDArray[np.int64]
Search = Callable[[Vectors, int], Keys]
"""Queries [Q, D], k -> keys [Q, k]."""

_TIMED = 200
_WARM = 20


@dataclass(frozen=True)
class Quality:
    """recall@10 and @100, and the median milliseconds of one query (k = 10) on one thread."""

    recall_at_10: float
    recall_at_100: float
    ms: float


def exact(queries: Vectors, batches: Iterable[tuple[Keys, NDArray[np.floating]]], k: int = 100) -> Keys:
    """Keys [Q, k] of the true neighbours, by brute force over all vectors, nearest first."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for keys, vectors in batches:
        similarity, places = faiss.knn(
            queries, np.ascontiguousarray(vectors, np.float32), min(k, len(keys)), metric=faiss.METRIC_INNER_PRODUCT
        )
        both, names = np.concatenate([best, similarity], 1), np.concatenate([found, keys[places]], 1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best, found = np.take_along_axis(both, order, 1), np.take_along_axis(names, order, 1)
    return found


def quality(search: Search, queries: Vectors, truth: Keys) -> Quality:
    """``queries`` [Q, D] float32, ``truth`` [Q, 100]."""
    faiss.omp_set_num_threads(1)
    ten, hundred = search(queries, 10), search(queries, 100)
    return Quality(_recall(ten, truth[:, :10]), _recall(hundred, truth[:, :100]), milliseconds(search, queries))


def milliseconds(search: Search, queries: Vectors, k: int = 10) -> float:
    """The median of one query at a time, after some that warm up. On as many threads as FAISS is set to."""
    taken = []
    for number, query in enumerate(queries[: _WARM + _TIMED]):
        start = time.perf_counter()
        search(query[None], k)
        if number >= min(_WARM, len(queries) // 2):
            taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def _recall(found: Keys, truth: Keys) -> float:
    hits = sum(len(np.intersect1d(f, t, assume_unique=False)) for f, t in zip(found, truth, strict=True))
    return hits / truth.size
