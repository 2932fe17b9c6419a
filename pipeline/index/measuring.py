"""What a search answers to the truth's queries, and what that says of it: recall and latency."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.index.arrays import Kept
from pipeline.index.building import Vectors
from pipeline.index.extended import Extended
from pipeline.index.searching import Found, best_of, dropped, search
from pipeline.index.truth import Truth
from pipeline.keys import Keys
from schemas.cards import Point

_TIMED = 100
"""Queries whose latency is measured, within some tenths of a second."""
_SECONDS = 0.2
_WARM = 3
_FEWEST = 50
_ASKED_SECONDS = 2.0

Parameters = dict[str, int]


@dataclass(frozen=True)
class Answers(Kept):
    """To the first q queries of a truth: of k = 10 and of k = 100, keys int64 and similarities float32 [q, k]; ``ms``:
    the median of one query at a time on one thread, k = 10.

    Kept beside a large index: what a small one adds to it can be measured without searching the large one again.
    """

    ten_keys: Keys
    ten_similarity: NDArray[np.float32]
    hundred_keys: Keys
    hundred_similarity: NDArray[np.float32]
    ms: NDArray[np.float64]

    @classmethod
    def of(cls, index: faiss.Index | Extended, truth: Truth, parameters: Parameters, hundred: bool = True) -> Self:
        """A slow search is asked fewer queries: as many as some seconds allow, and fifty at least. ``hundred``: False
        leaves k = 100 out."""
        ms = latency(index, truth.queries[:_TIMED], parameters)
        asked = max(_FEWEST, int(_ASKED_SECONDS * 1e3 / max(ms, 1e-3)))
        ten = _found(index, truth, asked, 10, parameters)
        more = _found(index, truth, asked, 100, parameters) if hundred else (ten[0][:, :0], ten[1][:, :0])
        return cls(ten[1], ten[0], more[1], more[0], np.array(ms))

    def point(self, truth: Truth, parameters: Parameters) -> Point:
        """What a search with these parameters, which gave these answers, reaches."""
        ten = self.ten_keys, self.ten_similarity
        return Point(
            search=parameters,
            recall_at_1=truth.recall(1, *ten),
            recall_at_10=truth.recall(10, *ten),
            recall_at_100=truth.recall(100, self.hundred_keys, self.hundred_similarity),
            ms_per_query=float(self.ms),
        )

    def beside(self, side: faiss.Index, gone: Keys, truth: Truth) -> Self:
        """Of an :class:`Extended` of the index that gave these answers: with what the small index finds, and without
        the keys ``gone``, in whose place the large one would find others. The recall is this or better."""
        asked = len(self.ten_keys)
        some = []
        for k, keys, similarity in (
            (10, self.ten_keys, self.ten_similarity),
            (100, self.hundred_keys, self.hundred_similarity),
        ):
            some.append(best_of(dropped(similarity, keys, gone), _found(side, truth, asked, k, {}), k))
        (ten_similarity, ten_keys), (hundred_similarity, hundred_keys) = some
        ms = self.ms + latency(side, truth.queries[:_TIMED], {})
        return type(self)(ten_keys, ten_similarity, hundred_keys, hundred_similarity, ms)


def measure(index: faiss.Index | Extended, truth: Truth, parameters: Parameters, hundred: bool = True) -> Point:
    """What the search with these parameters reaches: recall@1 and @10 of k = 10, recall@100 of k = 100 (``hundred``:
    else 0), latency."""
    return Answers.of(index, truth, parameters, hundred).point(truth, parameters)


def recall(found: Keys, truth: Keys) -> float:
    """Share of the true neighbours [Q, k] that were found [Q, k]."""
    hits = [len(set(f[f >= 0]) & set(t[t >= 0])) for f, t in zip(found, truth, strict=True)]
    return float(sum(hits) / max((truth >= 0).sum(), 1))


def latency(index: faiss.Index | Extended, queries: Vectors, parameters: Parameters) -> float:
    """Median milliseconds of one query on one thread, k = 10; of as many queries as some tenths of a second allow."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for query in queries[:_WARM]:
            search(index, query[None], 10, parameters)
        seconds: list[float] = []
        for query in queries:
            start = time.perf_counter()
            search(index, query[None], 10, parameters)
            seconds.append(time.perf_counter() - start)
            if sum(seconds) > _SECONDS:
                break
    finally:
        faiss.omp_set_num_threads(threads)
    return float(np.median(seconds) * 1e3) if seconds else 0.0


def _found(index: faiss.Index | Extended, truth: Truth, asked: int, k: int, parameters: Parameters) -> Found:
    """What a search for the truth's first queries returns, their own keys left out."""
    own = truth.own[:asked]
    some = bool((own >= 0).any())
    similarity, keys = search(index, truth.queries[:asked], k + some, parameters)
    if some:
        order = np.argsort(keys == own[:, None], axis=1, kind="stable")[:, :k]  # own keys to the end
        similarity, keys = np.take_along_axis(similarity, order, 1), np.take_along_axis(keys, order, 1)
    return similarity, keys
