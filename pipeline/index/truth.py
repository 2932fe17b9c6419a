"""The truth that recall is measured against: held-out queries and their exact nearest neighbours.

It lies beside the index, and follows it: what is added or taken out changes some lists, and nothing is searched anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.index.arrays import Kept
from pipeline.index.building import BLOCK, Vectors
from pipeline.keys import Keys

DEPTH = 200
"""Neighbours kept of each query; those beyond the hundredth are spare."""
_NEEDED = 100
_SAME = 1e-5
"""Similarities that differ by less are equal: sums of float32 in another order."""
_NEAR = 2e-3
"""The same for similarities that an index rounds."""

Similarities = NDArray[np.float32]


@dataclass(frozen=True)
class Truth(Kept):
    """Queries with their exact neighbours among the vectors of an index.

    ``queries``: float32 [Q, D]. ``own``: int64 [Q], the key that is left out of a query's results, since it is its own
    vector; -1 for none. ``keys`` int64 [Q, 200] and ``similarity`` float32 [Q, 200]: neighbours, nearest first, -1 and
    -inf where there are fewer. ``floor`` float32 [Q]: every vector nearer than this is listed; -inf: every one at all.
    """

    queries: NDArray[np.float32]
    own: Keys
    keys: Keys
    similarity: Similarities
    floor: Similarities

    @classmethod
    def empty(cls, queries: Vectors, own: Keys | None = None) -> Self:
        """Of an index without vectors."""
        count = len(queries)
        nobody = np.full(count, -1, np.int64)
        return cls(
            np.ascontiguousarray(queries, np.float32),
            nobody if own is None else np.asarray(own, np.int64),
            np.full((count, DEPTH), -1, np.int64),
            np.full((count, DEPTH), -np.inf, np.float32),
            np.full(count, -np.inf, np.float32),
        )

    @classmethod
    def of(cls, queries: Vectors, batches: Iterable[tuple[Keys, Vectors]], own: Keys | None = None) -> Self:
        """Search all vectors, which come in batches of keys [N] and vectors [N, D]; memory is a block of them."""
        truth = cls.empty(queries, own)
        for keys, vectors in batches:
            truth = truth.including(keys, vectors)
        return truth

    def including(self, keys: Keys, vectors: Vectors) -> Self:
        """With these vectors [N, D] beside those that were there."""
        truth = self
        for start in range(0, len(keys) if len(self.queries) else 0, BLOCK):
            rows = np.ascontiguousarray(vectors[start : start + BLOCK], np.float32)
            # One more, for the query's own.
            similarity, places = faiss.knn(
                self.queries, rows, min(DEPTH + 1, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
            )
            found = np.where(places >= 0, keys[start : start + BLOCK][places], -1)
            truth = truth._with(found, np.where(places >= 0, similarity, -np.inf).astype(np.float32), -np.inf)
        return truth

    def excluding(self, gone: Keys) -> Self:
        """Without these keys."""
        bad = np.isin(self.keys, gone)
        if not bad.any():
            return self
        return self._sorted(np.where(bad, -1, self.keys), np.where(bad, -np.inf, self.similarity), self.floor)

    def changed(self, gone: Keys, keys: Keys, vectors: Vectors) -> Self:
        """Without the keys ``gone``, and with new vectors; a changed vector's key is in both."""
        return self.excluding(gone).including(keys, vectors)

    def merged(self, other: Self) -> Self:
        """Of both indices: the same queries, over other vectors."""
        return self._with(other.keys, other.similarity, other.floor)

    def deep_enough(self) -> bool:
        """Is the hundredth neighbour of every query known, as far as there are so many?"""
        return bool((((self.keys >= 0).sum(axis=1) >= _NEEDED) | np.isneginf(self.floor)).all())

    def recall(self, k: int, found: Keys, similarity: Similarities) -> float:
        """Share of the k nearest that a search found: keys int64 and similarities float32 [Q, k] (or more), of the
        first Q queries.

        A vector as near as the k-th is as good as it: where several are equal (one caption of many pairs), any of them
        counts. If so many are equal that the list ends among them, the similarity that the search gave decides.
        """
        count, found, similarity = len(found), found[:, :k], similarity[:, :k]
        keys, exact = self.keys[:count], self.similarity[:count]
        wanted = np.minimum((keys >= 0).sum(axis=1), k)  # [Q]
        last = np.take_along_axis(exact, np.maximum(wanted - 1, 0)[:, None], 1)  # [Q, 1]
        equal = (found[:, :, None] == keys[:, None, :]) & (found >= 0)[:, :, None]  # [Q, k, 200]
        counted = (equal & (exact >= last - _SAME)[:, None, :]).any(axis=2)  # [Q, k]
        beyond = (found >= 0) & ~equal.any(axis=2) & (similarity >= last - _NEAR)
        counted |= beyond & (self.floor[:count, None] >= last - _SAME)
        counted &= found != self.own[:count, None]
        hits = np.minimum(counted.sum(axis=1), wanted)
        return float(hits.sum() / wanted.sum()) if wanted.sum() else 1.0

    def _with(self, keys: Keys, similarity: Similarities, floor: Similarities | float) -> Self:
        own = (keys == self.own[:, None]) & (self.own >= 0)[:, None]
        keys, similarity = np.where(own, -1, keys), np.where(own, -np.inf, similarity)
        return self._sorted(
            np.concatenate([self.keys, keys], axis=1),
            np.concatenate([self.similarity, similarity], axis=1),
            np.maximum(self.floor, floor),
        )

    def _sorted(self, keys: Keys, similarity: Similarities, floor: Similarities) -> Self:
        """Nearest first, equal ones by key; what is beyond the 200th, or what is known, is dropped."""
        similarity = np.where((similarity < floor[:, None]) | (keys < 0), -np.inf, similarity)
        order = np.lexsort((keys, -similarity), axis=1)
        keys, similarity = np.take_along_axis(keys, order, 1), np.take_along_axis(similarity, order, 1)
        if keys.shape[1] > DEPTH:
            beyond = ~np.isneginf(similarity[:, DEPTH])
            floor = np.where(beyond, np.maximum(floor, similarity[:, DEPTH - 1]), floor)
            keys, similarity = keys[:, :DEPTH], similarity[:, :DEPTH]
        keys = np.where(np.isneginf(similarity), -1, keys)
        return replace(self, keys=keys, similarity=similarity.astype(np.float32), floor=floor.astype(np.float32))
