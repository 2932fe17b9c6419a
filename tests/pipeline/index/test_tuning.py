"""Tuning: what the card says is what a search then reaches."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.index import Truth, build, deepened, frontier, recall, search, tune
from schemas.cards import Point
from tests.pipeline.index.data import KEYS, REFINED, neighbours, vectors

ROWS, QUERIES = vectors(2000), vectors(50, seed=1)


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IDMap,IVF16,PQ8x4fsr,Refine(SQ8)", "IDMap,IVF16,Flat"])
def test_the_search_is_tuned_to_the_recall(factory: str) -> None:
    """More lists are probed for more recall; what is measured is what a search then reaches."""
    index, truth = build(KEYS, ROWS, factory), Truth.of(QUERIES, [(KEYS, ROWS)])
    (low, _), (high, curve) = (tune(index, truth, target) for target in (0.2, 0.99))
    assert low.recall_at_10 >= 0.2
    assert all(1 <= point.search["nprobe"] <= 16 for point in (low, high))
    assert ("k_factor" in high.search) == ("Refine" in factory)
    for k, reached in ((10, high.recall_at_10), (100, high.recall_at_100)):
        exact = neighbours(QUERIES, KEYS, ROWS, k)
        _, found = search(index, QUERIES, k, high.search)
        assert reached == pytest.approx(recall(found, exact), abs=1e-9)
        if k == 10:
            assert high.recall_at_1 == np.mean(found[:, 0] == exact[:, 0])
    assert high in curve and high.ms_per_query > 0
    assert high.recall_at_10 >= 0.99 or high.recall_at_10 == max(p.recall_at_10 for p in curve)


def test_the_fastest_that_reaches_the_target_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up index: recall grows with lists and candidates, and each costs its own."""
    from pipeline.index import tuning

    def made_up(index: object, truth: object, parameters: dict[str, int], hundred: bool = True) -> Point:
        lists, factor = parameters["nprobe"], parameters["k_factor"]
        reached = min(lists / 8, 1) * min(factor / 4, 1)
        return Point(
            search=parameters, recall_at_1=0, recall_at_10=reached, recall_at_100=0, ms_per_query=lists**power + factor
        )

    power = 1
    monkeypatch.setattr(tuning, "measure", made_up)
    index = build(KEYS, ROWS, "IDMap,IVF16,PQ8x4fsr,Refine(SQ8)")
    best, curve = tune(index, Truth.empty(QUERIES), 1.0)
    assert best.search == {"nprobe": 8, "k_factor": 4}
    assert tune(index, Truth.empty(QUERIES), 0.5)[0].search == {"nprobe": 8, "k_factor": 4}, "5/8 are aimed at"
    assert tune(index, Truth.empty(QUERIES), 0.33)[0].search == {"nprobe": 4, "k_factor": 4}
    assert [p.ms_per_query for p in curve] == sorted(p.ms_per_query for p in curve)
    power = 2
    assert tune(index, Truth.empty(QUERIES), 0.5)[0].search == {"nprobe": 4, "k_factor": 4}, "5/8 cost too much"


def test_some_more_lists_are_tried_before_tuning_anew() -> None:
    index, truth = build(KEYS, ROWS, "IVF16,SQ8"), Truth.of(QUERIES, [(KEYS, ROWS)])
    point = deepened(index, truth, 0.97, {"nprobe": 8})
    assert point is not None and point.search["nprobe"] in (12, 16) and point.recall_at_10 >= 0.97
    assert deepened(index, truth, 0.97, {"nprobe": 1}) is None, "too far"
    assert deepened(index, truth, 0.97, {"nprobe": 16}) is None
    assert deepened(build(KEYS, ROWS, "IDMap,SQfp16"), truth, 0.97, {}) is None


def test_what_cannot_be_reached() -> None:
    index, truth = build(KEYS, ROWS, "IVF4,PQ4x4fs"), Truth.of(QUERIES, [(KEYS, ROWS)])
    best, curve = tune(index, truth, 0.999)
    assert best.recall_at_10 == max(p.recall_at_10 for p in curve) < 0.999
    assert {p.search["nprobe"] for p in curve} >= {1, 2, 4}


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap,SQfp16"])
def test_exact_search_is_exact(factory: str) -> None:
    half = ROWS[:500].astype(np.float16)
    point, curve = tune(build(KEYS[:500], half, factory), Truth.of(QUERIES, [(KEYS[:500], half)]), 0.95)
    assert (point.recall_at_1, point.recall_at_10, point.recall_at_100) == (1.0, 1.0, 1.0)
    assert point.search == {} and curve == (point,)


@pytest.mark.parametrize("factory", ["IDMap,Flat", REFINED[0]])
def test_own_vectors_are_left_out(factory: str) -> None:
    truth = Truth.of(ROWS[:50], [(KEYS, ROWS)], KEYS[:50])
    point, _ = tune(build(KEYS, ROWS, factory), truth, 0.9)
    assert point.recall_at_10 >= 0.9 and point.recall_at_1 >= 0.8


def test_the_frontier() -> None:
    def point(ms: float, reached: float) -> Point:
        return Point(search={}, recall_at_1=0, recall_at_10=reached, recall_at_100=0, ms_per_query=ms)

    points = (point(3, 0.9), point(1, 0.5), point(2, 0.4), point(2, 0.7), point(4, 0.9), point(5, 0.95))
    assert [(p.ms_per_query, p.recall_at_10) for p in frontier(points)] == [(1, 0.5), (2, 0.7), (3, 0.9), (5, 0.95)]
