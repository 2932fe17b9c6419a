"""Further columns of embeddings: what heads and zero-shot classification make of the image vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.vectors import unpack

Vectors = NDArray[np.float32]
Classifier = Callable[[Vectors], tuple[list[str], NDArray[np.float32]]]
"""Image vectors [N, D] -> the label of each, and its probability [N]."""


def score_fields(heads: Sequence[str], labels: bool) -> list[pa.Field]:
    """Names and types of the columns that heads of these names, and zero-shot classification, make."""
    fields = [pa.field(f"score_{name}", pa.float32()) for name in heads]
    return [*fields, pa.field("label", pa.string()), pa.field("label_score", pa.float32())] if labels else fields


class Scores:
    """Unit-norm image vectors [N, D] -> a column of N for each head, and the two of the classifier."""

    def __init__(self, heads: Sequence[Any] = (), classifier: Classifier | None = None) -> None:
        self.heads, self.classifier = heads, classifier

    def __call__(self, vectors: Vectors) -> dict[str, pa.Array]:
        columns = {f"score_{head.name}": pa.array(head(vectors), pa.float32()) for head in self.heads}
        if self.classifier is not None:
            labels, probabilities = self.classifier(vectors)
            columns |= {"label": pa.array(labels, pa.string()), "label_score": pa.array(probabilities, pa.float32())}
        return columns

    def lacking(self, rows: pa.Table, encoder: str) -> pa.Array:
        """Rows of embeddings -> bool [N]: those of this encoder with an image vector that lack one of the columns."""
        names = [f.name for f in score_fields([head.name for head in self.heads], self.classifier is not None)]
        lacks = pa.array(np.zeros(rows.num_rows, np.bool_))
        for name in names:
            lacks = pc.or_(lacks, pc.is_null(rows[name].combine_chunks()))
        return pc.and_(lacks, _own(rows, encoder))

    def again(self, rows: pa.Table, encoder: str, dim: int) -> pa.Table:
        """Rows of embeddings, which have these columns, with those of one encoder made from their stored vectors.

        An imported row may have no image vector: it has no scores either.
        """
        own = _own(rows, encoder)
        vectors = unpack(rows["image_vec"].filter(own).combine_chunks(), dim).astype(np.float32)  # [N, D]
        for name, values in self(vectors).items():
            place = rows.column_names.index(name)
            column = pc.replace_with_mask(rows[name].combine_chunks(), own, values)
            rows = rows.set_column(place, rows.schema.field(name), column)
        return rows


def _own(rows: pa.Table, encoder: str) -> pa.Array:
    return pc.and_(pc.equal(rows["encoder"], encoder), pc.is_valid(rows["image_vec"])).combine_chunks()
