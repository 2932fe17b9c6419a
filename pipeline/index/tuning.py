"""The cheapest search that reaches a target of recall."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss

from pipeline.index.building import lists
from pipeline.index.measuring import Parameters, measure
from pipeline.index.truth import Truth
from schemas.cards import Point

_FACTORS = (1, 2, 4, 8, 16, 32)
_EFFORTS = (16, 32, 64, 128, 256, 512)
_BEGIN, _STEP = 3, 4
_DEEPER = 3
_AROUND = (-9, -7, -5, -3, -2, -1, 1, 3)
_SPARE = 0.25
"""Of what a target leaves to 1: so much more is aimed at, that a recall does not sink below it the next night."""
_WORTH = 1.5
"""Times as long as without it a search may take for that: 4-bit codes get there, if at all, by reading every list."""


def tune(index: faiss.Index, truth: Truth, target: float) -> tuple[Point, tuple[Point, ...]]:
    """The fastest search whose recall@10 reaches ``target``, and some more where that costs little; and all that was
    tried, from fast to exact.

    Where none reaches it: the best. recall@100 is measured of the one that is taken. Recall grows with each parameter,
    so that only settings about the border are tried: with the largest ``k_factor`` the fewest lists, then fewer
    candidates, with some more lists if need be.
    """
    depths, factors = axes(index)
    aim = target + _SPARE * (1 - target)
    tried: dict[tuple[int, int], Point] = {}

    def at(depth: int, factor: int) -> Point:
        key = depth, factor
        if key not in tried:
            tried[key] = measure(index, truth, _parameters(index, depths[depth], factors[factor]), hundred=False)
        return tried[key]

    last, widest = len(depths) - 1, len(factors) - 1

    def walk(goal: float) -> None:
        depth = _first(lambda d: at(d, widest).recall_at_10 >= goal, last)
        for factor in reversed(range(widest)):
            near = range(depth, min(depth + 3, last + 1))
            enough = next((d for d in near if at(d, factor).recall_at_10 >= goal), None)
            if enough is None:
                break
            depth = enough

    walk(target)
    walk(aim)
    best = _best(list(tried.values()), target, aim)
    deepest, factor = next(key for key, point in tried.items() if point is best)
    for depth in (deepest + step for step in _AROUND):  # for the picture
        if 0 <= depth <= last and best.recall_at_10 < 1.0:
            at(depth, factor)
    points = list(tried.values())
    best = _best(points, target, aim)
    points[points.index(best)] = best = measure(index, truth, best.search)
    return best, tuple(sorted(points, key=lambda p: (p.ms_per_query, p.recall_at_10)))


def deepened(index: faiss.Index, truth: Truth, target: float, present: Parameters) -> Point | None:
    """The same search, some steps deeper, if that is enough to reach ``target`` again; None: tune anew."""
    depths, _ = axes(index)
    name = next((n for n in ("nprobe", "efSearch") if n in present), None)
    for depth in [d for d in depths if name and d > present[name]][:_DEEPER]:
        point = measure(index, truth, present | {str(name): depth})
        if point.recall_at_10 >= target:
            return point
    return None


def _first(reaches: Callable[[int], bool], last: int) -> int:
    """The first of 0 ... ``last`` that reaches, if what is larger reaches more; ``last`` where none does.

    In steps from the small ones, as the large ones cost most, then by halves.
    """
    below, at = -1, min(_BEGIN, last)
    while not reaches(at):
        if at == last:
            return last
        below, at = at, min(at + _STEP, last)
    while at - below > 1:
        middle = (below + at) // 2
        below, at = (below, middle) if reaches(middle) else (middle, at)
    return at


def frontier(points: tuple[Point, ...]) -> list[Point]:
    """Those points that no faster one surpasses, by latency."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms_per_query, -p.recall_at_10)):
        if not kept or point.recall_at_10 > kept[-1].recall_at_10:
            kept.append(point)
    return kept


def axes(index: Any) -> tuple[list[int], list[int]]:
    """What can be tuned: how deep a search goes (lists, or the graph's effort), and how many candidates it refines.

    One zero where there is nothing to tune.
    """
    number, layers = lists(index), layers_of(index)
    depths = [0]
    if number > 1:
        doubled = [2**i for i in range(number.bit_length())]
        halves = [3 * 2**i for i in range(2, number.bit_length())]
        depths = sorted(d for d in {*doubled, *halves, number} if d <= number)
    elif any(isinstance(layer, faiss.IndexHNSW) for layer in layers):
        depths = list(_EFFORTS)
    factors = list(_FACTORS) if any(isinstance(layer, faiss.IndexRefine) for layer in layers) else [0]
    return depths, factors


def layers_of(index: Any) -> list[Any]:
    """An index and those inside of it, the outermost first."""
    found = [faiss.downcast_index(index)]
    while True:
        inside = getattr(found[-1], "base_index", None) or getattr(found[-1], "index", None)
        if inside is None or not isinstance(inside, faiss.Index):
            return found
        found.append(faiss.downcast_index(inside))


def _parameters(index: Any, depth: int, factor: int) -> Parameters:
    deep = {"nprobe" if lists(index) > 1 else "efSearch": depth} if depth else {}
    return deep | ({"k_factor": factor} if factor else {})


def _best(points: list[Point], target: float, aim: float) -> Point:
    """The fastest that reaches ``aim`` where that is worth it, else ``target``; else the one that reaches most."""
    enough = [p for p in points if p.recall_at_10 >= target]
    if not enough:
        return max(points, key=lambda p: p.recall_at_10)
    least = min(p.ms_per_query for p in enough)
    more = [p for p in enough if p.recall_at_10 >= aim and p.ms_per_query <= _WORTH * least]
    return min(more or enough, key=lambda p: p.ms_per_query)
