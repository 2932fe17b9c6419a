"""Exact search over the records' stored vectors, and the exact similarity of what an index found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.keys import Keys
from pipeline.records import Records

Similarity = NDArray[np.float32]
Found = tuple[Similarity, Keys]

NOTHING = np.finfo(np.float32).min
"""The similarity where there is no result; its key is -1."""
_BLOCK = 16_384
"""Vectors that are compared at once."""
_AT_ONCE = 256
"""Queries that are: memory is a matrix of float32 [_AT_ONCE, _BLOCK]."""
_SCORED = 16_384
"""Vectors that are scored again at once."""


def nothing(queries: int, k: int) -> Found:
    """Results of which none is there yet."""
    return np.full((queries, k), NOTHING, np.float32), np.full((queries, k), -1, np.int64)


def scan(records: Records, queries: NDArray[np.float32], keys: Keys, modality: str, k: int) -> Found:
    """The k nearest of ``keys`` (sorted) to each query [Q, D]: float32 and int64 [Q, k]; -1 where there are fewer.

    Of equally near ones the smaller key comes first.
    """
    similarity, found = nothing(len(queries), k)
    for first in range(0, len(queries), _AT_ONCE):
        some = queries[first : first + _AT_ONCE]
        best: Found = np.empty((len(some), 0), np.float32), np.empty((len(some), 0), np.int64)
        for start in range(0, len(keys), _BLOCK):
            block = keys[start : start + _BLOCK]
            products = some @ records.vectors(block, modality).astype(np.float32).T  # [Q, B]
            best = _nearest(best, products, block, k)
        width = best[0].shape[1]
        similarity[first : first + len(some), :width], found[first : first + len(some), :width] = best
    return similarity, found


def _nearest(best: Found, products: Similarity, keys: Keys, k: int) -> Found:
    """The k best of ``best`` [Q, b] and of a block's ``products`` [Q, B] with its ``keys`` [B], all larger ones."""
    if products.shape[1] > k:
        least = np.partition(products, products.shape[1] - k, axis=1)[:, -k, None]
        there = products >= least  # k of each row, and more where several are as near as the last
        most = int(there.sum(axis=1).max())
        chosen = np.argsort(~there, axis=1, kind="stable")[:, :most]
        products, block = np.take_along_axis(products, chosen, 1), keys[chosen]
    else:
        block = np.broadcast_to(keys, products.shape)
    similarity, found = np.concatenate([best[0], products], 1), np.concatenate([best[1], block], 1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(found, order, 1)


def rescored(records: Records, queries: NDArray[np.float32], found: Found, modality: str) -> Found:
    """The same keys [Q, k] by the similarity of their stored vectors: an index of codes knows it only about."""
    similarity, keys = found[0].copy(), found[1]
    rows, columns = np.nonzero(keys >= 0)
    there = records.known(keys[rows, columns])
    rows, columns = rows[there], columns[there]
    for start in range(0, len(rows), _SCORED):
        some = rows[start : start + _SCORED], columns[start : start + _SCORED]
        vectors = records.vectors(keys[some], modality).astype(np.float32)  # [n, D]
        similarity[some] = np.einsum("nd,nd->n", queries[some[0]], vectors)
    return ordered(similarity, keys)


def ordered(similarity: Similarity, keys: Keys) -> Found:
    """Each row [Q, k] by similarity; of equally near ones the smaller key first, what is not there last."""
    order = np.lexsort((keys, -np.where(keys >= 0, similarity, NOTHING)), axis=-1)
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(keys, order, 1)
