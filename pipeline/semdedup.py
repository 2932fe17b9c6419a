"""Semantic near-duplicates (SemDeDup: Abbas et al., 2023, arXiv 2303.09540): k-means, then cosines within clusters.

Images are taken in an order. One whose cosine with an earlier kept image of its cluster reaches the threshold is
marked, with the first such; else it is kept, and a marked image keeps no other. (The paper's algorithm marks what is
near to any earlier image, kept or not: a chain of small changes loses all but its first. Here every marked image is
itself near to one that is kept.) As in the paper, only images of one cluster are compared, and neighbouring clusters
are not looked into: a pair that k-means puts apart is not found.

Memory: the vectors as float16, and blocks of them as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import faiss
import numpy as np
from numpy.typing import NDArray

from schemas.vectors import normalise

EXACT_UP_TO = 10_000
"""Images that are one cluster: all pairs of them are a second's work."""
_CLUSTERS = 50_000
"""The most that are chosen: the paper's number for 440 million images."""
_PER_CLUSTER = 100
"""Vectors a cluster that k-means looks at."""
_ITERATIONS = 20
_ROUNDING = 1e-6
"""Of a cosine of unit float32 vectors: an image's with its own copy may be 1 less this."""

Vectors = NDArray[np.float16]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Marks:
    """Which rows are marked [M], ascending, the kept row that each is a duplicate of [M], and their cosine [M]."""

    rows: Numbers
    kept: Numbers
    cosine: NDArray[np.float32]
    clusters: int
    largest: int


def choose_clusters(count: int) -> int:
    """One while that is quick; then about the square root, which balances k-means and the comparing after it."""
    return 1 if count <= EXACT_UP_TO else min(round(math.sqrt(count)), _CLUSTERS)


def find_duplicates(
    vectors: Vectors,
    order: Numbers,
    threshold: float,
    clusters: int = 0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda rows: None,
) -> Marks:
    """Rows of ``vectors`` [N, D] that mean the same as a kept one.

    ``order`` [N]: all row numbers, in the order in which they are taken. ``clusters``: k of k-means, at most N; 0:
    chosen by N. ``advance`` is told of the rows that are done.
    """
    count = len(vectors)
    k = min(clusters, count) if clusters else choose_clusters(count)
    cluster = assign(vectors, k, seed)  # [N]
    by_cluster = order[np.argsort(cluster[order], kind="stable")]  # within a cluster: in order
    bounds = np.searchsorted(cluster[by_cluster], np.arange(k + 1))
    rows, kept, cosine = [], [], []
    for start, end in pairwise(bounds):
        members = by_cluster[start:end]
        keeper, near = settle(vectors, members, threshold)
        marked = keeper >= 0
        rows.append(members[marked])
        kept.append(keeper[marked])
        cosine.append(near[marked])
        advance(len(members))
    found = np.concatenate(rows) if rows else np.empty(0, np.int64)
    ascending = np.argsort(found)
    return Marks(
        found[ascending],
        np.concatenate(kept)[ascending] if kept else found,
        np.concatenate(cosine)[ascending] if cosine else np.empty(0, np.float32),
        k,
        int(np.diff(bounds).max(initial=0)),
    )


def assign(vectors: Vectors, k: int, seed: int, block: int = 1 << 16) -> NDArray[np.int32]:
    """The cluster of each row of ``vectors`` [N, D]: spherical k-means, trained on a seeded sample."""
    count, dim = vectors.shape
    if k <= 1:
        return np.zeros(count, np.int32)
    sample = np.sort(np.random.default_rng(seed).permutation(count)[: k * _PER_CLUSTER])
    kmeans = faiss.Kmeans(
        dim, k, niter=_ITERATIONS, spherical=True, seed=seed % (1 << 31),
        min_points_per_centroid=1, max_points_per_centroid=_PER_CLUSTER,
    )  # fmt: skip
    kmeans.train(normalise(vectors[sample]))
    index = faiss.IndexFlatIP(dim)
    index.add(np.asarray(kmeans.centroids))
    found = np.empty(count, np.int32)
    for start in range(0, count, block):
        _, nearest = index.search(normalise(vectors[start : start + block]), 1)  # [B, 1]
        found[start : start + block] = nearest[:, 0]
    return found


def settle(
    vectors: Vectors, members: Numbers, threshold: float, block: int = 1024
) -> tuple[Numbers, NDArray[np.float32]]:
    """One cluster: ``members`` [C], row numbers in order -> the kept row that each is near to, -1 if kept; the cosine.

    A block is compared with all that are kept before it, then within itself.
    """
    least = threshold - _ROUNDING
    keeper, near = np.full(len(members), -1, np.int64), np.zeros(len(members), np.float32)
    kept = np.empty(0, np.int64)  # places in members, ascending
    for start in range(0, len(members), block):
        x = normalise(vectors[members[start : start + block]])  # [B, D]
        own = slice(start, start + len(x))
        for begin in range(0, len(kept), 4 * block):
            places = kept[begin : begin + 4 * block]
            cosines = x @ normalise(vectors[members[places]]).T  # [B, K]
            _mark(keeper[own], near[own], cosines, cosines >= least, members[places])
        free = _settle_block(x @ x.T, least, keeper[own], near[own], members[own])
        kept = np.concatenate([kept, start + free])
    return keeper, np.minimum(near, np.float32(1))


def _mark(
    keeper: Numbers, near: NDArray[np.float32], cosines: NDArray[np.float32], hit: NDArray[np.bool_], rows: Numbers
) -> None:
    """Give those of keeper [B] that have none the first row [K] that they hit [B, K]. In place."""
    new = np.flatnonzero((keeper < 0) & hit.any(axis=1))
    first = hit[new].argmax(axis=1)
    keeper[new], near[new] = rows[first], cosines[new, first]


def _settle_block(
    cosines: NDArray[np.float32], least: float, keeper: Numbers, near: NDArray[np.float32], rows: Numbers
) -> Numbers:
    """Decide a block's rows [B] one after the other, from their cosines [B, B]. In place; the places of the kept."""
    kept = []
    for i in range(len(rows)):
        if keeper[i] >= 0:
            continue
        kept.append(i)
        new = i + 1 + np.flatnonzero((cosines[i, i + 1 :] >= least) & (keeper[i + 1 :] < 0))
        keeper[new], near[new] = rows[i], cosines[i, new]
    return np.array(kept, np.int64)
