"""The truth follows the index: what is known after changes is what a search of all finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.index import Truth, build, search
from pipeline.index import truth as module
from schemas.errors import CardError
from tests.pipeline.index.data import KEYS, neighbours, vectors

ROWS, QUERIES = vectors(1200), vectors(9, seed=1)


def batches(keys: np.ndarray, rows: np.ndarray, size: int):
    for start in range(0, len(keys), size):
        yield keys[start : start + size], rows[start : start + size]


def test_exact_neighbours_whatever_the_batches() -> None:
    for size in (7, 500, 1200):
        truth = Truth.of(QUERIES, batches(KEYS[:1200], ROWS, size))
        np.testing.assert_array_equal(truth.keys, neighbours(QUERIES, KEYS[:1200], ROWS, 200))
        similarity = np.sort(QUERIES @ ROWS.T, axis=1)[:, ::-1][:, :200]
        np.testing.assert_allclose(truth.similarity, similarity, atol=1e-6)
        assert truth.deep_enough()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changes_equal_a_search_of_all(data: st.DataObject) -> None:
    """After any changes, every listed neighbour is right, and none is missing above the last one."""
    there = {int(i) for i in range(data.draw(st.integers(0, 600)))}
    truth = Truth.of(QUERIES, [(KEYS[sorted(there)], ROWS[sorted(there)])])
    for _ in range(data.draw(st.integers(1, 3))):
        share = data.draw(st.sampled_from([0.0, 0.1, 0.6]))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        gone = {i for i in there if rng.random() < share}
        new = set(rng.choice(1200, data.draw(st.integers(0, 80)), replace=False).tolist()) - (there - gone)
        there = (there - gone) | new
        truth = truth.changed(KEYS[sorted(gone)], KEYS[sorted(new)], ROWS[sorted(new)])
    rows = np.array(sorted(there), np.int64)
    expected = neighbours(QUERIES, KEYS[rows], ROWS[rows], 200)
    for q in range(len(QUERIES)):
        depth = int((truth.keys[q] >= 0).sum())
        assert truth.keys[q, :depth].tolist() == expected[q, :depth].tolist()
        if truth.floor[q] == -np.inf:
            assert depth == min(len(rows), 200)
    whole = Truth.of(QUERIES, batches(KEYS[rows], ROWS[rows], 50))
    if truth.deep_enough():
        np.testing.assert_array_equal(truth.keys[:, :100], whole.keys[:, :100])


def test_too_many_changes_are_noticed() -> None:
    truth = Truth.of(QUERIES, [(KEYS[:1200], ROWS)])
    nearest = np.unique(truth.keys[:, :101])
    assert truth.changed(truth.keys[0, :99], KEYS[:0], ROWS[:0]).deep_enough()
    assert not truth.changed(nearest, KEYS[:0], ROWS[:0]).deep_enough()
    few = Truth.of(QUERIES, [(KEYS[:90], ROWS[:90])])
    assert few.changed(KEYS[:80], KEYS[:0], ROWS[:0]).deep_enough(), "all ten are known"


def test_shards_merge_to_the_whole() -> None:
    whole = Truth.of(QUERIES, [(KEYS[:1200], ROWS)])
    parts = [Truth.of(QUERIES, [(KEYS[a:b], ROWS[a:b])]) for a, b in ((0, 3), (3, 700), (700, 1200))]
    merged = parts[0].merged(parts[1]).merged(parts[2])
    np.testing.assert_array_equal(merged.keys, whole.keys)
    np.testing.assert_array_equal(merged.floor, whole.floor)


def test_a_query_does_not_find_itself() -> None:
    own = KEYS[:3]
    truth = Truth.of(ROWS[:3], [(KEYS[:300], ROWS[:300])], own)
    assert not (truth.keys == own[:, None]).any()
    np.testing.assert_array_equal(truth.keys, neighbours(ROWS[:3], KEYS[:300], ROWS[:300], 201)[:, 1:])
    similarity, found = search(build(KEYS[:300], ROWS[:300], "IDMap,Flat"), ROWS[:3], 11)
    assert truth.recall(10, found[:, 1:], similarity[:, 1:]) == 1.0
    assert truth.recall(10, found[:, :10], similarity[:, :10]) == 0.9, "the own key is no hit"


@pytest.mark.parametrize(
    ("found", "share"),
    [([1, 2], 1.0), ([2, 1], 1.0), ([1, 4], 0.5), ([4, 5], 0.0), ([1, -1], 0.5), ([1, 3], 1.0), ([2, 3], 1.0)],
)
def test_recall_by_hand(found: list[int], share: float) -> None:
    """Key 1 is nearest, 2 and 3 are equal, 4 and 5 farther: two of the first three are two right ones."""
    angles = np.array([0.1, 0.5, 0.5, 0.9, 1.2])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    truth = Truth.of(np.array([[1.0, 0.0]]), [(np.array([1, 2, 3, 4, 5]), rows)])
    similarity = np.array([[rows[key - 1, 0] if key > 0 else -9.0 for key in found]], np.float32)
    assert truth.recall(2, np.array([found]), similarity) == share


def test_equal_vectors_beyond_the_list() -> None:
    """Of a thousand copies any ten are right, listed or not; another vector is not."""
    rows = np.repeat(ROWS[:2], 1000, axis=0)
    keys = np.arange(2000)
    truth = Truth.of(ROWS[:1], [(keys, rows)])
    same = np.full((1, 10), float(ROWS[0] @ ROWS[0]), np.float32)
    assert truth.recall(10, np.arange(990, 1000)[None], same) == 1.0
    other = np.full((1, 10), float(ROWS[0] @ ROWS[1]), np.float32)
    assert truth.recall(10, np.arange(1500, 1510)[None], other) == 0.0


def test_nothing_to_find() -> None:
    truth = Truth.of(QUERIES, [])
    assert truth.recall(10, np.full((9, 10), -1), np.zeros((9, 10), np.float32)) == 1.0
    assert truth.deep_enough()


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = UPath(tmp_path / "image.truth.npz")
    truth = Truth.of(QUERIES, [(KEYS[:300], ROWS[:300])], np.array([5, *[-1] * 8]))
    truth.save(path)
    back = Truth.load(path)
    for name in ("queries", "own", "keys", "similarity", "floor"):
        np.testing.assert_array_equal(getattr(back, name), getattr(truth, name))


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:100], lambda d: b"", lambda d: None])
def test_a_damaged_truth(tmp_path: Path, change) -> None:
    path = UPath(tmp_path / "image.truth.npz")
    Truth.of(QUERIES, [(KEYS[:300], ROWS[:300])]).save(path)
    data = change(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CardError, match=r"image\.truth\.npz") as caught:
        Truth.load(path)
    assert "--rebuild" in caught.value.remedy


def test_a_tampered_truth(tmp_path: Path) -> None:
    """Whole as a zip, and not what was written."""
    path = tmp_path / "image.truth.npz"
    Truth.of(QUERIES, [(KEYS[:300], ROWS[:300])]).save(UPath(path))
    parts = dict(np.load(path))
    parts["keys"][0, 0] += 1
    np.savez(path, **parts)
    with pytest.raises(CardError, match=r"digest|changed"):
        Truth.load(UPath(path))
    assert module.DEPTH == 200
