"""Searching: only these keys, none of those, and k results wherever there are k."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index import build, recall, remove, search
from schemas.errors import ClipmillError
from tests.pipeline.index.data import ALL, EXACT, KEYS, REFINED, circle, neighbours, vectors

ROWS = vectors(2000)


def test_neighbours_on_a_circle() -> None:
    keys = np.array([40, 30, 20, 10, 50, 70])
    similarity, found = search(build(keys, circle(6), "IDMap,Flat"), circle(6), 3)
    np.testing.assert_allclose(similarity, [[1, 0.5, 0.5]] * 6, atol=1e-6)
    assert found[:, 0].tolist() == keys.tolist()
    for i in range(6):
        assert set(found[i, 1:]) == {keys[i - 1], keys[(i + 1) % 6]}


def test_fewer_vectors_than_asked_for() -> None:
    _, found = search(build(np.array([5, 6]), circle(2), "IDMap,Flat"), circle(1), 4)
    assert found.tolist() == [[5, 6, -1, -1]]


@pytest.mark.parametrize("factory", ALL)
def test_search_among_some_keys(factory: str) -> None:
    """Through every layer that FAISS puts around its lists: only these keys, and the best of them."""
    index = build(KEYS, ROWS, factory)
    only = np.sort(KEYS[::40])
    _, found = search(index, ROWS[:5], 3, {"nprobe": 4, "k_factor": 16}, only)
    assert set(found.ravel().tolist()) <= set(only.tolist())
    exact = neighbours(ROWS[:5], KEYS[::40], ROWS[::40], 3)
    assert recall(found, exact) >= (1.0 if factory in EXACT else 0.4)
    _, none = search(index, ROWS[:1], 3, {"nprobe": 4}, np.array([1]))
    assert none.tolist() == [[-1, -1, -1]]
    _, less = search(index, ROWS[:5], 3, {"nprobe": 4}, only, without=only[::2])
    assert set(less.ravel().tolist()) <= {-1, *only[1::2].tolist()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_without_equals_brute_force(data: st.DataObject) -> None:
    """Deleted before the search or inside the index, few or nearly all: the best k of the others."""
    n = data.draw(st.integers(1, 120))
    k = data.draw(st.integers(1, 40))
    gone = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True)), np.int64)
    hide = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True)), np.int64)
    index = build(KEYS[:n], ROWS[:n], data.draw(st.sampled_from(["IDMap,Flat", "IDMap,HNSW32"])))
    remove(index, KEYS[hide])  # of the graph: tombstones inside
    without = np.sort(np.append(KEYS[gone], [1, 10**16]))  # some were never there
    left = np.setdiff1d(np.arange(n), np.union1d(gone, hide))
    similarity, found = search(index, ROWS[:7], k, {"efSearch": 512}, without=without)
    expected = neighbours(ROWS[:7], KEYS[left], ROWS[left], k)
    np.testing.assert_array_equal(found, expected)
    there = found >= 0
    truth = np.sort(ROWS[:7] @ ROWS[left].T, axis=1)[:, ::-1][:, :k]
    np.testing.assert_allclose(similarity[there], truth.ravel(), atol=1e-5)


@pytest.mark.parametrize("factory", [f for f in ALL if "IVF" in f])
def test_k_results_wherever_there_are_k(factory: str) -> None:
    """Though the lists probed hold fewer, and though most of them are deleted."""
    index = build(KEYS, ROWS, factory)
    for k in (1, 10, 700, 2000):
        assert (search(index, ROWS[:4], k, {"nprobe": 1, "k_factor": 1})[1] >= 0).all()
    left = np.sort(KEYS[5::100])
    without = np.setdiff1d(KEYS, left)
    _, found = search(index, ROWS[:4], 20, {"nprobe": 1, "k_factor": 1}, without=without)
    assert [sorted(row.tolist()) for row in found] == [left.tolist()] * 4
    _, found = search(index, ROWS[:4], 25, {"nprobe": 1}, without=without)
    assert (found[:, 20:] == -1).all() and (found[:, :20] >= 0).all()


@pytest.mark.parametrize("factory", REFINED)
def test_one_result_is_refined_like_ten(factory: str) -> None:
    index = build(KEYS, ROWS, factory)
    one, ten = (search(index, vectors(50, seed=1), k, {"nprobe": 4, "k_factor": 1})[1] for k in (1, 10))
    assert one[:, 0].tolist() == ten[:, 0].tolist()


@pytest.mark.parametrize("queries", [np.zeros((1, 8)), np.zeros(16)])
def test_queries_of_another_dimension(queries: np.ndarray) -> None:
    with pytest.raises(ClipmillError, match="another dimension"):
        search(build(KEYS[:10], vectors(10), "IDMap,Flat"), queries, 1)


def test_no_queries() -> None:
    similarity, found = search(build(KEYS[:10], vectors(10), "IDMap,Flat"), np.zeros((0, 16)), 3)
    assert similarity.shape == found.shape == (0, 3)
