"""A version of an index, opened: its FAISS files and records, and the search over both, filtered or not."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from pipeline.collection.exact import Found, nothing, ordered, rescored, scan
from pipeline.index import open_index, search
from pipeline.keys import Keys, among, both, minus
from pipeline.records import Records
from schemas.cards import IndexCard
from schemas.errors import UsageError

EXACT_UP_TO = 20_000
"""Matches of a predicate up to which all of them are compared.

Of 200,000 x 512, on one thread: 20,000 in 37 ms, 50,000 in 92. Sifting the results of IVF1024,SQ8 takes 4 ms then, at a
recall of 0.97; of 10,000 matches 8 ms, at 0.94.
"""
_MOST_FETCHED = 16_384
"""Results of one FAISS search; for more, all vectors are compared."""
_WIDER = 4
_SPARE = 1.3
"""How many more than are needed on the average are fetched at first."""
_REMEMBERED = 32
_IS_EXACT = re.compile(r"(IDMap2?,)?(Flat|SQfp16)")


class Opened:
    """One version. Thread-safe; its memory maps are closed when the last search over it ends.

    Raises:
        CardError: a file is missing, truncated, or not the one that the card describes.
    """

    def __init__(self, folder: UPath, card: IndexCard, verify: bool = True) -> None:
        self.card = card
        self.records = Records.open(folder, card.segments, verify)
        paths = {f.modality: (str(folder / card.version / f.path), f) for f in card.files}
        self._indices = {modality: open_index(path, file, verify) for modality, (path, file) in paths.items()}
        self._gone: tuple[Keys | None, Keys] = None, np.empty(0, np.int64)
        self._matches: OrderedDict[tuple[str, str], tuple[Keys, Keys]] = OrderedDict()
        self._lock = Lock()

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self._indices)

    def gone(self, deleted: Keys) -> Keys:
        """Of the deleted keys those that are still in this version, sorted; remembered as long as it is that array."""
        asked, found = self._gone
        if asked is not deleted:
            found = both(deleted, self.records.keys)
            self._gone = deleted, found
        return found

    def finds(self, keys: Keys, modality: str | None, deleted: Keys) -> NDArray[np.bool_]:
        """Which of these keys, of any shape, are there (with a vector of this modality) and not deleted."""
        having = self.records.keys if modality is None else self.records.has(modality)
        gone = self.gone(deleted)
        there = among(having, keys)
        return there & ~among(gone, keys) if len(gone) else there

    def count(self, modality: str) -> int:
        """How many vectors there are to be found, deleted ones included."""
        return len(self.records.has(modality))

    def require(self, modality: str) -> None:
        """Raises UsageError where the index has no such vectors."""
        if modality not in self._indices:
            raise UsageError(
                f"the index has no {modality} vectors",
                expected=" or ".join(self.modalities),
                actual=modality,
                remedy=f"clipmill index --modality {modality}",
            )

    def search(self, queries: NDArray[np.float32], k: int, modality: str, where: str | None, deleted: Keys) -> Found:
        """The k nearest of each query [Q, D], without deleted ones: see :meth:`Collection.search_vectors`."""
        self.require(modality)
        gone = self.gone(deleted)
        if where is not None:
            return self._filtered(queries, k, modality, where, gone)
        if k > _MOST_FETCHED:
            return scan(self.records, queries, minus(self.records.has(modality), gone), modality, k)
        return self._again(queries, self._nearest(queries, k, modality, gone), modality)

    def matching(self, where: str, modality: str, gone: Keys) -> Keys:
        """The keys for which a predicate is true, with a vector of this modality, not deleted; sorted."""
        with self._lock:
            known = self._matches.get((where, modality))
            if known is not None and known[0] is gone:
                self._matches.move_to_end((where, modality))
                return known[1]
        keys, having = self.records.matching(where), self.records.has(modality)
        if having is not self.records.keys:
            keys = both(keys, having)
        keys = minus(keys, gone)
        with self._lock:
            self._matches[where, modality] = gone, keys
            while len(self._matches) > _REMEMBERED:
                self._matches.popitem(last=False)
        return keys

    def _filtered(self, queries: NDArray[np.float32], k: int, modality: str, where: str, gone: Keys) -> Found:
        """Few matches are compared one by one; of many, the index's results are sifted, more until k are left."""
        only = self.matching(where, modality, gone)
        spread = self.count(modality) / max(len(only), 1)  # of so many vectors one is a match
        fetched = int(_SPARE * k * spread) + 8
        if len(only) <= max(EXACT_UP_TO, k) or fetched > _MOST_FETCHED:
            return scan(self.records, queries, only, modality, k)
        found = nothing(len(queries), k)
        short = np.arange(len(queries))
        while len(short) and fetched <= _MOST_FETCHED:
            similarity, keys = self._nearest(queries[short], fetched, modality, gone, math.sqrt(spread))
            passed = among(only, keys)
            enough = passed.sum(axis=1) >= k
            done = short[enough]
            if len(done):
                first = np.argsort(~passed[enough], axis=1, kind="stable")[:, :k]
                sifted = np.take_along_axis(similarity[enough], first, 1), np.take_along_axis(keys[enough], first, 1)
                found[0][done], found[1][done] = self._again(queries[done], sifted, modality)
            short = short[~enough]
            fetched *= _WIDER
        if len(short):
            found[0][short], found[1][short] = scan(self.records, queries[short], only, modality, k)
        return found

    def _nearest(self, queries: NDArray[np.float32], k: int, modality: str, gone: Keys, wider: float = 1.0) -> Found:
        """``wider``: as many times the lists are looked into: matches are further away than what they are among."""
        own = self.card.file(modality).search
        parameters = {n: math.ceil(wider * value) if n in ("nprobe", "efSearch") else value for n, value in own.items()}
        without = gone if len(gone) else None
        found: Found = search(self._indices[modality], queries, k, parameters, without=without)
        return found

    def _again(self, queries: NDArray[np.float32], found: Found, modality: str) -> Found:
        """By the similarity of the stored vectors, where the index does not have these themselves."""
        if _IS_EXACT.fullmatch(self.card.file(modality).factory):
            return ordered(*found)
        return rescored(self.records, queries, found, modality)
