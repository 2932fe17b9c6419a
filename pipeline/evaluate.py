"""Evaluate: retrieval, prior and generation, as numbers that mean the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def retrieval(queries: Floats, answers: Floats, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k: how often the answer of the same row is among a query's k best; both unit-norm [N, D].

    Answers that score exactly as high as the right one do not push it down.
    """
    scores = queries @ answers.T  # [N, N]
    better = (scores > scores.diagonal()[:, None]).sum(1)  # [N]
    return {f"r@{k}": float((better < k).mean()) for k in ks}


def cosine(a: Floats, b: Floats) -> float:
    """Mean cosine of matching rows [N, D]."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.einsum("nd,nd->n", a, b) / np.maximum(lengths, 1e-12)).mean())


def best_of(scores: Floats, value: Floats, ns: Sequence[int]) -> dict[int, float]:
    """Mean ``value`` of the candidate that scores best among the first n: scores, value [P, N]."""
    rows = np.arange(len(scores))
    return {n: float(value[rows, scores[:, :n].argmax(1)].mean()) for n in ns if n <= scores.shape[1]}


def oracle(value: Floats, ns: Sequence[int]) -> dict[int, float]:
    """Mean of the best ``value`` among the first n [P, N]: what a perfect ranking would reach."""
    return {n: float(value[:, :n].max(1).mean()) for n in ns if n <= value.shape[1]}


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
