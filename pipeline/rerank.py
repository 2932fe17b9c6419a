"""Rerank: candidates of a prompt by their CLIP score, best first (DALL-E 1, section 2.5)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def clip_scores(pictures: NDArray[np.floating], text: NDArray[np.floating]) -> NDArray[np.float32]:
    """Cosine of each picture's vector [N, D] with the prompt's [N, D]; both unit-norm."""
    return np.asarray(np.einsum("nd,nd->n", pictures, text), dtype=np.float32)


def ranks(scores: NDArray[np.floating]) -> NDArray[np.int32]:
    """Rank of each of one prompt's candidates [N], 1 for the best; of equals the lower number is first."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    return rank
