"""Evaluate: retrieval, prior and generation, as numbers that mean the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_LABEL, SEVERAL_LABELS = -1, -2

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


class LabelFinder:
    """The one label that occurs in a caption as whole words, in any case: its number, NO_LABEL or SEVERAL_LABELS.

    A label inside a longer one is not counted: «red» is not in «a red panda» where «red panda» is a label.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._numbers = {_words(label): i for i, label in reversed(list(enumerate(labels)))}
        self._longest = max(map(len, self._numbers))

    def __call__(self, caption: str) -> int:
        words, at, found = _words(caption), 0, set()
        while at < len(words):
            lengths = range(min(self._longest, len(words) - at), 0, -1)
            length = next((n for n in lengths if words[at : at + n] in self._numbers), 0)
            if length:
                found.add(self._numbers[words[at : at + length]])
            at += max(length, 1)
        return SEVERAL_LABELS if len(found) > 1 else next(iter(found), NO_LABEL)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


class ZeroShotScores:
    """How often the true label is the best or among the best five, over batches of images."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._true: list[NDArray[np.int32]] = []
        self._best: list[NDArray[np.int32]] = []
        self._better: list[NDArray[np.int32]] = []

    @property
    def rows(self) -> int:
        """Images added."""
        return sum(map(len, self._true))

    def add(self, true: NDArray[np.integer], scores: Floats) -> None:
        """Numbers of the true labels [B], and the score of every label [B, L]."""
        own = scores[np.arange(len(true)), true]  # [B]
        self._true.append(true.astype(np.int32))
        self._best.append(scores.argmax(axis=1).astype(np.int32))
        self._better.append((scores > own[:, None]).sum(axis=1).astype(np.int32))

    def metrics(self) -> dict[str, Any]:
        """Accuracy top-1 and top-5, over all images, as the mean of the classes, and for each class that occurs.

        For at least one image.
        """
        true, better = np.concatenate(self._true), np.concatenate(self._better)  # [N]
        rows = np.bincount(true, minlength=len(self.labels))  # [L]
        hits = {k: np.bincount(true[better < k], minlength=len(self.labels)) for k in (1, 5)}
        seen = np.flatnonzero(rows)
        return {
            "rows": len(true),
            **{f"top{k}": float(hits[k].sum() / len(true)) for k in hits},
            "mean_per_class_top1": float((hits[1][seen] / rows[seen]).mean()),
            "per_class": {
                self.labels[i]: {"rows": int(rows[i]), **{f"top{k}": float(hits[k][i] / rows[i]) for k in hits}}
                for i in seen
            },
        }

    def confusion(self, most: int) -> tuple[list[str], NDArray[np.float64]]:
        """Of the ``most`` most frequent labels: names [M], and the share of each one's images that got each [M, M]."""
        true, best = np.concatenate(self._true), np.concatenate(self._best)
        rows = np.bincount(true, minlength=len(self.labels))
        chosen = np.argsort(-rows, kind="stable")[:most]
        chosen = chosen[rows[chosen] > 0]
        place = np.full(len(self.labels), -1)
        place[chosen] = np.arange(len(chosen))
        inside = (place[true] >= 0) & (place[best] >= 0)
        counts = np.zeros((len(chosen), len(chosen)))
        np.add.at(counts, (place[true[inside]], place[best[inside]]), 1)
        return [self.labels[i] for i in chosen], counts / rows[chosen][:, None]
