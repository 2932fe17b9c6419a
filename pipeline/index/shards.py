"""Filling a trained index: in one go, or in shards whose indices are written aside, then merged.

Memory: a worker holds its shard's index and a block of vectors; who merges holds the whole index and one shard's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import faiss
from upath import UPath

from pipeline.index.building import add, merge
from pipeline.index.files import open_file, write_index
from pipeline.index.source import Source
from pipeline.index.truth import Truth


@dataclass(frozen=True)
class Stored:
    """An index in a file, on its way from one process to another."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, index: faiss.Index, path: UPath) -> Self:
        return cls(str(path), *write_index(index, path))

    def open(self) -> faiss.Index:
        """Raises CardError where the file is not the one that was written."""
        return open_file(UPath(self.path), self.bytes, self.sha256, mapped=False)


@dataclass(frozen=True)
class Shard:
    """An index of a share of the vectors, and the truth among them."""

    rank: int
    file: Stored
    truth: Truth | None


class ShardFiller:
    """Stage: the number of a share of ``world`` -> its index, written to ``folder``.

    Args:
        trained: the empty index that every shard begins with.
        truth: of an empty index, to find the share's exact neighbours, too; None: they are known.
    """

    def __init__(self, trained: Stored, source: Source, world: int, folder: UPath, truth: Truth | None) -> None:
        self._trained, self._source, self._world, self._folder, self._truth = trained, source, world, folder, truth

    def __call__(self, rank: int) -> Shard:
        index = self._trained.open()
        truth = fill(index, self._source, self._truth, rank, self._world)
        file = Stored.of(index, self._folder / f"{self._source.modality}-{rank:05d}.shard")
        return Shard(rank, file, truth)


def fill(index: faiss.Index, source: Source, truth: Truth | None, rank: int = 0, world: int = 1) -> Truth | None:
    """Add a share of the vectors to an index, in place. Returns ``truth`` with them, if it is to be found."""
    for keys, vectors in source.batches(rank, world):
        add(index, keys, vectors)
        if truth is not None:
            truth = truth.including(keys, vectors)
    return truth


def merge_shards(index: faiss.Index, shards: Sequence[Shard], truth: Truth | None) -> Truth | None:
    """Merge shards into an empty, trained index in the order of their ranks, and remove each one's file.

    The index is the one that :func:`fill` makes of all vectors. Returns ``truth`` with that of all shards.

    Raises:
        CardError: a shard's file is not the one that was written.
    """
    for shard in sorted(shards, key=lambda s: s.rank):
        merge(index, shard.file.open())
        UPath(shard.file.path).unlink()
        if truth is not None and shard.truth is not None:
            truth = truth.merged(shard.truth)
    return truth
