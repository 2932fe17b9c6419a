"""Kinds of index: what a vector costs in each, which recall it can reach, and the choice between them.

Measured on 100,000 x 512 vectors with cluster structure (benchmarks/lab/space.py), 100 held-out queries of the other
modality, 1,024 lists, one thread of a CPU with AVX2 that others used, too; single runs. MB of the file; CPU seconds of
the build; recall@10 with 128 of the lists and with all; milliseconds a query, and recall@100, at recall@10 of 0.95 (or
as given).

kind                                     MB  CPU s   128    all      ms  @100
IVF, PQ128x4fsr, Refine(SQ8)             62    12  0.989  0.993    0.27  0.84
IVF, PQ128x4fsr, Refine(SQfp16)         114     9  0.991  0.995    0.27  0.84
IVF, RaBitQfs, Refine(SQ8)               63    10  0.990  0.998    0.34  0.84
IVF, SQ8                                 54     9  0.987  0.995    0.48  0.84
IVF, RaBitQ4                             31    18  0.953  0.960    0.82  0.94
IVF, SQ4 (from least to largest)         29    10  0.918  0.919    0.19  0.63  at 0.79
IVF, RaBitQ                              10    10  0.779  0.777    0.17  0.70  at 0.76
IVF, PQ128x4fs                           10    18  0.723  0.724    0.94  0.75  at 0.72
SQfp16 (exact)                          103     1      -  1.000   23.3   1.00
Flat (exact)                            206     0      -  1.000   21.7   1.00

So: a scan of 4-bit codes, refined, is the fastest at any recall that it can give, and costs 15% more bytes than SQ8
alone. Of the small codes 4-bit RaBitQ gives the most; those of one bit a dimension are for budgets that allow no more.
Flat is no faster than SQfp16, which is as exact (the vectors are float16) in half the memory. Fewer, longer lists scan
more for the same recall: 512 of them took 0.43 ms instead of 0.27.

At 500,000 x 512 and 2,048 lists, in as little memory as autofaiss takes there (141 MB, recall 0.932 in 9.1 ms): RaBitQ4
146 MB, 0.934 in 2.7 ms; after PCA and a random rotation to 480 dimensions 139 MB, 0.933 in 2.9 ms (without the rotation
0.72: its codes want all dimensions alike); SQ4 136 MB, 0.947 with all lists if a code spans three standard deviations,
0.915 if it spans all, but 9.3 ms at 0.935; RaBitQ3 114 MB, 0.921 in 2.7 ms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

EXACT_UP_TO = 50_000
"""Vectors up to which exact search is quick."""
_GRAPH_FROM = 16_384
"""Lists from which their centroids are searched through a graph."""
_ID = 8
_FEW = 256
"""Vectors that are compared one by one as quickly as by their codes."""


@dataclass(frozen=True)
class Kind:
    """A FAISS index over ``count`` vectors.

    ``recall``: recall@10 that it can be expected to reach with a part of its lists; ``ms``: what one query takes at
    recall 0.95, or at its own, over 100,000 vectors. ``vector``: bytes of one vector; ``matrix``: of what turns them.
    """

    factory: str
    recall: float
    ms: float
    vector: float
    lists: int = 0
    matrix: int = 0

    def bytes(self, count: int, dim: int) -> int:
        """Bytes of the index over so many vectors of so many dimensions, in memory and on disk."""
        graph = 2 * 4 * 32 + 16 if self.lists >= _GRAPH_FROM else 0
        # Fast-scan codes come in blocks of 32, of which the last one of a list is half empty.
        blocks = 16 * dim / 8 if "fs" in self.factory else 0
        lists = self.lists * (4 * dim + graph + blocks + 2 * _ID)
        return round(count * self.vector + lists) + self.matrix + 16_384

    @property
    def name(self) -> str:
        """The factory without the number of lists."""
        return kind_of(self.factory)


@dataclass(frozen=True)
class _Row:
    """A row of the table: ``code`` gives the bytes of a vector's code, keys included, for D dimensions."""

    factory: str
    code: Callable[[int], float]
    recall: float
    ms: float
    multiple: int = 1
    matrix: bool = False


# Refined kinds hold their vectors by position, so that they need a map of keys around them; others have the keys in
# their lists. Of a refined one the lists hold positions, of eight bytes each, besides.
_TABLE = (
    _Row("IDMap,SQfp16", lambda d: 2 * d + _ID, 1.0, 23.0),
    _Row("IDMap,IVF{lists},PQ{quarter}x4fsr,Refine(SQfp16)", lambda d: 17 * d / 8 + 2 * _ID, 0.99, 0.27, multiple=4),
    _Row("IDMap,IVF{lists},RaBitQfs,Refine(SQ8)", lambda d: 9 * d / 8 + 3 * _ID, 0.988, 0.34, multiple=8),
    _Row("IVF{lists},SQ8", lambda d: d + _ID, 0.986, 0.48),
    _Row("IDMap,IVF{lists},PQ{quarter}x4fsr,Refine(SQ8)", lambda d: 9 * d / 8 + 2 * _ID, 0.985, 0.26, multiple=4),
    _Row("IVF{lists},RaBitQ4", lambda d: d / 2 + 3.5 * _ID, 0.955, 0.82, multiple=8),
    _Row("PCAR{most},IVF{lists},RaBitQ4", lambda d: _most(d) / 2 + 3.5 * _ID, 0.945, 0.83, multiple=128, matrix=True),
    _Row("IVF{lists},SQ4", lambda d: d / 2 + _ID, 0.94, 2.2),
    _Row("IVF{lists},RaBitQ", lambda d: d / 8 + 2 * _ID, 0.775, 0.5, multiple=8),
    _Row("IVF{lists},PQ{quarter}x4fs", lambda d: d / 8 + _ID, 0.72, 0.94, multiple=4),
)  # fmt: skip


def kinds(count: int, dim: int) -> list[Kind]:
    """All kinds that D = ``dim`` allows, with as many lists as ``count`` vectors want."""
    found = []
    for row in _TABLE:
        if dim % row.multiple:
            continue
        lists = number_of_lists(count) if "{lists}" in row.factory else 0
        name = f"{lists}_HNSW32" if lists >= _GRAPH_FROM else str(lists)
        factory = row.factory.format(lists=name, quarter=dim // 4, most=_most(dim))
        matrix = 4 * dim * (_most(dim) + dim) if row.matrix else 0  # FAISS keeps all of them
        found.append(Kind(factory, row.recall, row.ms, row.code(dim), lists, matrix))
    return found


def _most(dim: int) -> int:
    """Dimensions that are left of ``dim`` where a sixteenth is dropped."""
    return dim - dim // 16


def number_of_lists(count: int) -> int:
    """The power of two that is nearest to three times the root of ``count``: 1,024 for 100,000."""
    return int(2 ** max(0, min(round(math.log2(3 * math.sqrt(max(count, 1)))), 20)))


def choose(count: int, dim: int, target: float, memory: int | None = None) -> list[Kind]:
    """What to build for ``count`` vectors, in the order in which to try: recalls grow from one to the next.

    First the fastest kind that can be expected to reach ``target`` recall@10 in ``memory`` bytes; then the more exact
    ones that fit. Where none can be expected to, the most exact one that fits; none at all where none fits.
    """
    fit = [kind for kind in kinds(count, dim) if memory is None or kind.bytes(count, dim) <= memory]
    if not fit:
        return []
    exact = max(fit, key=lambda kind: kind.recall)
    if exact.recall == 1.0 and count <= EXACT_UP_TO:
        return [exact]
    able = [kind for kind in fit if kind.recall >= target]
    chosen = [min(able, key=lambda kind: kind.ms) if able else exact]
    for kind in sorted(fit, key=lambda kind: kind.recall):
        if kind.recall > chosen[-1].recall:
            chosen.append(kind)
    return chosen


def enough_memory(count: int, dim: int, target: float, memory: int) -> int | None:
    """Bytes of the smallest kind beyond ``memory`` that can be expected to reach ``target``; None: there is none."""
    larger = [kind.bytes(count, dim) for kind in kinds(count, dim) if kind.recall >= target]
    return min((size for size in larger if size > memory), default=None)


def kind_beside(factory: str, count: int, dim: int) -> str:
    """The kind of a small index, to be searched whole beside one of ``factory``: exact where that one is."""
    exact = kind_of(factory) in ("IDMap,Flat", "IDMap,SQfp16") or count < _FEW
    return "IDMap,SQfp16" if exact or dim % 8 else "IDMap,IVF1,RaBitQfs,Refine(SQfp16)"


def kind_of(factory: str) -> str:
    """A factory string without the number of its lists: what stays the same while an index grows."""
    return re.sub(r"IVF\d+(_HNSW\d+)?", "IVF", factory).replace("IDMap2", "IDMap")
