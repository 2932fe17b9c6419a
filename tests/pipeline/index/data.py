"""Vectors whose neighbours are known, and all kinds of index, small."""

from __future__ import annotations

import numpy as np

KEYS = 10**15 + 7 * np.arange(2000)[::-1].copy()
D = 16
EXACT = ["IDMap2,Flat", "IDMap,Flat", "IDMap,SQfp16"]
LISTS = ["IVF4,SQ8", "IVF4,SQ4", "IVF4,RaBitQ4", "IVF4,RaBitQ", "IVF4,PQ4x4fs", "PCA12,IVF4,SQ8"]
REFINED = [
    "IDMap,IVF4,PQ4x4fsr,Refine(SQ8)", "IDMap,IVF4,PQ4x4fsr,Refine(SQfp16)", "IDMap2,IVF4,PQ4x4fsr,Refine(SQ8)",
    "IDMap,IVF4,RaBitQfs,Refine(SQ8)", "IDMap,IVF4_HNSW32,PQ4x4fsr,Refine(SQ8)",
]  # fmt: skip
LAYERED = ["IDMap,PCA12,IVF4,SQ8"]
ALL = [*EXACT, *LISTS, *REFINED, *LAYERED]


def circle(n: int) -> np.ndarray:
    """n unit vectors around a circle: the neighbours of i are i - 1 and i + 1."""
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def vectors(n: int, dim: int = D, seed: int = 0) -> np.ndarray:
    """Unit vectors in no order at all."""
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def neighbours(queries: np.ndarray, keys: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Keys of the k nearest by sorting all similarities [Q, k], -1 where there are fewer."""
    order = np.argsort(-(queries @ rows.astype(np.float32).T), axis=1)[:, :k]
    found = np.full((len(queries), k), -1, np.int64)
    found[:, : order.shape[1]] = keys[order]
    return found
