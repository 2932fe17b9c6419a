"""Zero-shot classification (Radford et al., 2021, section 3.1): labels as texts, the nearest one wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UsageError
from schemas.vectors import normalise

_LABELS = 64
"""Labels encoded at once, with all their templates."""
_BLOCK = 8192
"""Images classified at once."""


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """Image vectors -> their label and its probability. Holds no model, and is picklable.

    ``text`` [L, D]: a unit-norm vector for each label. ``scale``: what cosines are multiplied with before the softmax,
    the temperature that the model was trained with.
    """

    labels: tuple[str, ...]
    text: NDArray[np.float32]
    scale: float

    @classmethod
    def load(cls, encoder: Any, labels_file: str, templates_file: str | None = None) -> Self:
        """Labels and templates of these files, with an :class:`~pipeline.models.encoder.Encoder`'s vectors.

        A label's vector is the mean of its templates' unit-norm vectors, made unit-norm again: the ensemble over
        the embedding space of section 3.1.4. Without a file the templates are the paper's 80 for ImageNet, as
        open_clip has them.

        Raises:
            UsageError: a file that cannot be read, holds nothing, holds a line twice, or a template without {}.
        """
        labels = read_labels(labels_file)
        templates = read_templates(templates_file)
        parts = []
        for start in range(0, len(labels), _LABELS):
            chunk = labels[start : start + _LABELS]
            vectors = encoder.texts([t.replace("{}", label) for label in chunk for t in templates])  # [L * T, D]
            parts.append(vectors.reshape(len(chunk), len(templates), -1).mean(axis=1))  # [L, D]
        return cls(tuple(labels), normalise(np.concatenate(parts)), logit_scale(encoder))

    def probabilities(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """softmax(scale * cosine) over the labels: unit-norm [B, D] -> [B, L].

        A model trained with sigmoids (SigLIP) has a bias beside its scale. It is the same for all labels, so neither
        the order nor this softmax changes with it: the probabilities are of one label against the others given, not
        of a label against none.
        """
        logits = self.scale * (np.asarray(vectors, np.float32) @ self.text.T)  # [B, L]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)

    def __call__(self, vectors: NDArray[np.floating]) -> tuple[list[str], NDArray[np.float32]]:
        """Unit-norm image vectors [N, D] -> the best label of each, and its probability [N]."""
        best, score = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), _BLOCK):
            rows = slice(start, start + _BLOCK)
            chances = self.probabilities(vectors[rows])
            best[rows], score[rows] = chances.argmax(axis=1), chances.max(axis=1)
        return [self.labels[i] for i in best.tolist()], score


def logit_scale(encoder: Any) -> float:
    """exp(t), the temperature that an encoder was trained with (section 2.3)."""
    return float(encoder.model.logit_scale.detach().float().exp().mean())


def read_labels(file: str) -> list[str]:
    """The labels of a text file, a line each; empty lines are left out.

    Raises:
        UsageError: unreadable, empty, or a label twice (upper and lower case are one to CLIP's tokenizers).
    """
    return _lines(file, "label")


def read_templates(file: str | None) -> list[str]:
    """The templates of a text file, a line each, {} for the label; without a file the paper's 80.

    Raises:
        UsageError: unreadable, empty, a template twice or without {}.
    """
    if file is None:
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    templates = _lines(file, "template")
    if without := [t for t in templates if "{}" not in t]:
        raise UsageError(
            f"a template in {file} has no place for the label", expected="{} in every line", actual=_some(without)
        )
    return templates


def _lines(file: str, what: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read the {what}s in {file}", actual=str(exc), expected="a UTF-8 text file") from exc
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError(f"{file} holds no {what}", expected=f"a {what} on each line")
    count = Counter(line.casefold() for line in lines)
    twice = [line for line in lines if count[line.casefold()] > 1]
    if twice:
        raise UsageError(f"{file} holds a {what} twice", expected=f"each {what} once", actual=_some(twice))
    return lines


def _some(lines: Sequence[str]) -> str:
    return ", ".join(repr(line) for line in lines[:10]) + (f" and {len(lines) - 10} more" if len(lines) > 10 else "")
