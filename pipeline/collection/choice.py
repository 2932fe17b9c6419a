"""Which of the nearest are shown: near enough, not the same again, not all alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_BLOCK = 256
_SAME = 1e-5
"""A cosine of equal vectors may be so much below 1."""
_LEAST, _MOST = 50, 1000


def pool(k: int) -> int:
    """How many candidates the most varied k are chosen from."""
    return max(_LEAST, min(5 * k, k + _MOST))


def distinct(vectors: Vectors, cosine: float, enough: int) -> NDArray[np.int64]:
    """Of unit vectors [n, D], best first, those that are not as near as ``cosine`` to a better one that is kept.

    Ends at ``enough``. Returns their places, in order.
    """
    kept: list[int] = []
    limit = cosine - _SAME
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        near = np.zeros(len(block), np.bool_)
        if kept:
            near |= (block @ vectors[kept].T >= limit).any(axis=1)
        alike = block @ block.T >= limit  # [B, B]
        for i in range(len(block)):
            if near[i]:
                continue
            kept.append(start + i)
            if len(kept) == enough:
                return np.array(kept, np.int64)
            near |= alike[i]
    return np.array(kept, np.int64)


def varied(vectors: Vectors, similarity: NDArray[np.float32], k: int, diversity: float) -> NDArray[np.int64]:
    """k of the unit vectors [n, D] by maximal marginal relevance: their places, in the order in which they are chosen.

    Each is the one of largest ``lambda * similarity - (1 - lambda) * max cosine to one chosen before``, with
    lambda = 1 - ``diversity``: 0 gives the nearest, 1 looks at differences alone (but for the first).

    Source: Carbonell and Goldstein, The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing
    Summaries, SIGIR 1998, section 2.
    """
    relevance = (1 - diversity) * similarity.astype(np.float32)  # [n]
    nearest = np.full(len(vectors), -np.inf, np.float32)  # to one of those chosen
    left = np.ones(len(vectors), np.bool_)
    chosen: list[int] = []
    for _ in range(min(k, len(vectors))):
        if chosen:
            nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
            marginal = relevance - diversity * nearest
        else:
            marginal = similarity
        best = int(np.argmax(np.where(left, marginal, -np.inf)))
        chosen.append(best)
        left[best] = False
    return np.array(chosen, np.int64)
