"""Semantic duplicates against plain loops, by hand, and what holds for any vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.semdedup import EXACT_UP_TO, Marks, assign, choose_clusters, find_duplicates, settle
from schemas.vectors import normalise


def clumped(seed: int, n: int, dim: int = 8, clumps: int = 5, spread: float = 0.3) -> np.ndarray:
    """float16 [N, D] about a few centres, some of them exact copies."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clumps, dim))
    x = centres[rng.integers(0, clumps, n)] + spread * rng.normal(size=(n, dim))
    copies = rng.random(n) < 0.2
    x[copies] = x[rng.integers(0, n, copies.sum())]
    return normalise(x).astype(np.float16)


def loop(vectors: np.ndarray, order: list[int], cluster: np.ndarray, threshold: float) -> dict[int, int]:
    """One image after the other, compared with each kept one before it: marked row -> kept row."""
    unit = normalise(vectors).astype(np.float64)
    kept: list[int] = []
    marks: dict[int, int] = {}
    for row in order:
        near = [k for k in kept if cluster[k] == cluster[row] and unit[k] @ unit[row] >= threshold - 1e-6]
        if near:
            marks[row] = near[0]
        else:
            kept.append(row)
    return marks


def as_dict(found: Marks) -> dict[int, int]:
    return dict(zip(found.rows.tolist(), found.kept.tolist(), strict=True))


def safe(vectors: np.ndarray, threshold: float) -> bool:
    """No cosine so near to the threshold that rounding decides."""
    unit = normalise(vectors).astype(np.float64)
    return not (np.abs(unit @ unit.T - threshold + 1e-6) < 5e-7).any()


@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.97]), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_one_cluster_is_the_loop(seed: int, n: int, threshold: float, block: int) -> None:
    vectors = clumped(seed, n)
    if not safe(vectors, threshold):
        return
    order = np.random.default_rng(seed).permutation(n)
    keeper, near = settle(vectors, order, threshold, block)
    expected = loop(vectors, order.tolist(), np.zeros(n), threshold)
    assert {int(order[i]): int(k) for i, k in enumerate(keeper) if k >= 0} == expected
    unit = normalise(vectors)
    for i, k in enumerate(keeper):
        if k >= 0:
            assert near[i] == pytest.approx(float(unit[order[i]] @ unit[k]), abs=1e-5)
    assert as_dict(find_duplicates(vectors, order, threshold)) == expected


@given(st.integers(0, 1000), st.integers(2, 80), st.integers(1, 12))
@settings(max_examples=8, deadline=None)
def test_with_clusters(seed: int, n: int, clusters: int) -> None:
    vectors = clumped(seed, n)
    if not safe(vectors, 0.9):
        return
    order = np.random.default_rng(seed + 1).permutation(n)
    found = find_duplicates(vectors, order, 0.9, clusters, seed=seed)
    cluster = assign(vectors, min(clusters, n), seed)
    assert as_dict(found) == loop(vectors, order.tolist(), cluster, 0.9)
    assert found.clusters == min(clusters, n)
    assert found.largest == np.bincount(cluster).max()
    assert found.rows.tolist() == sorted(found.rows.tolist())
    again = find_duplicates(vectors, order, 0.9, clusters, seed=seed)
    np.testing.assert_array_equal(again.rows, found.rows)
    np.testing.assert_array_equal(again.cosine, found.cosine)


def test_by_hand() -> None:
    # Angles in degrees; 0.95 is 18.19 degrees. 10 is near to 0; 20 to 10 alone, which is marked; 33 to 20.
    angles = np.radians([0, 10, 20, 33, 120, 120])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float16)
    found = find_duplicates(vectors, np.arange(6), 0.95)
    assert as_dict(found) == {1: 0, 3: 2, 5: 4}
    assert found.cosine == pytest.approx([np.cos(np.radians(10)), np.cos(np.radians(13)), 1], abs=1e-3)
    assert found.cosine[2] <= 1
    # In the other direction: 33 keeps 20, 10 keeps 0.
    assert as_dict(find_duplicates(vectors, np.arange(6)[::-1], 0.95)) == {0: 1, 2: 3, 4: 5}


def test_copies_are_found_at_a_threshold_of_one() -> None:
    vectors = np.repeat(clumped(0, 40, dim=512, spread=1.0), 2, axis=0)
    found = find_duplicates(vectors, np.arange(80), 1.0)
    unique = np.unique(vectors, axis=0)
    assert len(found.rows) == 80 - len(unique)


def test_clusters_keep_tight_groups_together() -> None:
    """Groups well apart: one is kept of each, and another one where k-means splits a group."""
    vectors = clumped(3, 3000, dim=32, clumps=12, spread=0.02)
    order = np.arange(3000)
    everything = find_duplicates(vectors, order, 0.9, 1)
    assert 3000 - len(everything.rows) == 12
    some = find_duplicates(vectors, order, 0.9, 12)
    assert 12 <= 3000 - len(some.rows) <= 12 + 12
    assert set(some.rows.tolist()) <= set(everything.rows.tolist())


def test_nothing_and_one() -> None:
    assert len(find_duplicates(np.empty((0, 4), np.float16), np.empty(0, np.int64), 0.9).rows) == 0
    assert len(find_duplicates(np.ones((1, 4), np.float16), np.zeros(1, np.int64), 0.9, 100).rows) == 0


def test_how_many_clusters() -> None:
    assert [choose_clusters(n) for n in (0, 1, EXACT_UP_TO, 1_000_000, 10**11)] == [1, 1, 1, 1000, 50_000]


def test_progress_adds_up() -> None:
    done: list[int] = []
    find_duplicates(clumped(0, 100), np.arange(100), 0.9, 7, advance=done.append)
    assert sum(done) == 100
