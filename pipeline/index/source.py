"""Where an index's vectors come from: one modality of one encoder, at a version of the table embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.index.building import BLOCK
from pipeline.keys import NONE, Keys, minus
from pipeline.tables import Table
from pipeline.vectors import read_keys, read_vectors, vector_batches
from schemas.errors import NothingToDo

Vectors = NDArray[np.float16]
Batch = tuple[Keys, Vectors]


@dataclass(frozen=True)
class Source:
    """The vectors of one modality, less those of the keys ``without`` (sorted). Picklable; reads as it is asked.

    Batches come in the table's order, which is always the same.
    """

    table: Table
    encoder: str
    modality: str
    version: int
    dim: int
    without: Keys = field(default_factory=lambda: NONE)

    def keys(self, paths: Collection[str] | None = None) -> Keys:
        """All keys with a vector (in these files of the table), sorted; none where there is none."""
        try:
            found = read_keys(self.table, self.encoder, self.modality, version=self.version, dim=self.dim, paths=paths)
            keys = np.sort(found)
        except NothingToDo:
            return NONE
        return minus(keys, self.without)

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """All keys and vectors, some at a time; or one of ``world`` shares, which make up the whole in their order."""
        found = vector_batches(
            self.table, self.encoder, self.modality,
            size=BLOCK, rank=rank, world=world, version=self.version, dim=self.dim,
        )  # fmt: skip
        for keys, vectors in found:
            kept = ~np.isin(keys, self.without) if len(self.without) else np.ones(len(keys), np.bool_)
            if kept.all():
                yield keys, vectors
            elif kept.any():
                yield keys[kept], vectors[kept]

    def take(self, keys: Keys) -> Vectors:
        """float16 [n, D], the vectors of sorted keys [n], all of which are there."""
        if not len(keys):
            return np.empty((0, self.dim), np.float16)
        _, vectors = read_vectors(
            self.table, self.encoder, self.modality,
            ordered=True, among=keys, version=self.version, dim=self.dim,
        )  # fmt: skip
        return vectors
