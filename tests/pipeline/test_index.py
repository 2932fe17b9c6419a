"""Indices on matrices whose neighbours are known."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index import (
    EXACT_UP_TO,
    add,
    build,
    choose_factory,
    from_bytes,
    keys_sha256,
    measure,
    read_keys,
    recall,
    search,
    to_bytes,
)
from schemas.errors import CardError, ClipmillError

LAYERED = ["IDMap2,Flat", "IVF4,SQ8", "IDMap2,IVF4,PQ4x4fsr,Refine(SQ8)", "PCA12,IVF4,SQ8", "IDMap2,PCA12,IVF4,SQ8"]


def circle(n: int) -> np.ndarray:
    """n unit vectors around a circle: the neighbours of i are i - 1 and i + 1."""
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


KEYS = 10**15 + 7 * np.arange(2000)[::-1].copy()


@pytest.mark.parametrize(
    ("found", "truth", "share"),
    [
        ([[1, 2]], [[1, 2]], 1.0),
        ([[2, 1]], [[1, 2]], 1.0),
        ([[1, 3]], [[1, 2]], 0.5),
        ([[1, 3], [5, 6]], [[1, 2], [3, 4]], 0.25),
        ([[1, -1]], [[1, 2]], 0.5),
        ([[1, -1]], [[1, -1]], 1.0),
        ([[-1, -1]], [[1, 2]], 0.0),
        ([[3, 4]], [[1, 2]], 0.0),
    ],
)
def test_recall(found: list[list[int]], truth: list[list[int]], share: float) -> None:
    assert recall(np.array(found), np.array(truth)) == share


def test_neighbours_on_a_circle() -> None:
    keys = np.array([40, 30, 20, 10, 50, 70])
    similarity, found = search(build(keys, circle(6), "IDMap2,Flat"), circle(6), 3)
    np.testing.assert_allclose(similarity, [[1, 0.5, 0.5]] * 6, atol=1e-6)
    assert found[:, 0].tolist() == keys.tolist()
    for i in range(6):
        assert set(found[i, 1:]) == {keys[i - 1], keys[(i + 1) % 6]}


def test_fewer_vectors_than_asked_for() -> None:
    _, found = search(build(np.array([5, 6]), circle(2), "IDMap2,Flat"), circle(1), 4)
    assert found.tolist() == [[5, 6, -1, -1]]


@pytest.mark.parametrize("factory", LAYERED)
def test_search_among_some_keys(factory: str) -> None:
    """Through every layer that FAISS puts around its lists: only these keys, and the best of them."""
    rows = vectors(2000)
    index = build(KEYS, rows, factory)
    only = KEYS[::40]
    _, found = search(index, rows[:5], 3, {"nprobe": 4}, only)
    assert set(found.ravel().tolist()) <= set(only.tolist())
    exact = np.argsort(-(rows[:5] @ rows[::40].T), axis=1)[:, :3]
    assert recall(found, only[exact]) >= (1.0 if factory == "IDMap2,Flat" else 0.5)
    assert found[0, 0] == KEYS[0], "its own vector is among them"
    _, none = search(index, rows[:1], 3, {"nprobe": 4}, np.array([1]))
    assert none.tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("factory", LAYERED)
def test_keys_and_bytes_round_trip(factory: str) -> None:
    rows = vectors(2000)
    index = build(KEYS, rows, factory)
    data = to_bytes(index)
    back = from_bytes(data, hashlib.sha256(data).hexdigest(), "x")
    assert sorted(read_keys(back).tolist()) == sorted(KEYS.tolist())
    for a, b in zip(search(index, rows[:9], 5), search(back, rows[:9], 5), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IDMap2,IVF16,PQ8x4fsr,Refine(SQ8)", "IDMap2,IVF16,Flat"])
def test_the_search_is_tuned_to_the_recall(factory: str) -> None:
    """More lists are probed for more recall; what is measured is what a search then reaches."""
    rows, queries = vectors(2000), vectors(50, seed=1)
    index = build(KEYS, rows, factory)
    low, high = (measure(index, factory, KEYS, rows, queries, target) for target in (0.2, 0.999))
    assert 1 <= low.search["nprobe"] < high.search["nprobe"] <= 16
    assert low.recall_at_10 >= 0.2 and low.recall_at_10 <= high.recall_at_10
    truth = KEYS[np.argsort(-(queries @ rows.T), axis=1)[:, :10]]
    _, found = search(index, queries, 10, high.search)
    assert high.recall_at_10 == recall(found, truth)
    assert high.recall_at_1 == np.mean(found[:, 0] == truth[:, 0])


def test_exact_search_is_exact() -> None:
    rows, queries = vectors(500), vectors(20, seed=1)
    measured = measure(build(KEYS[:500], rows, "IDMap2,Flat"), "IDMap2,Flat", KEYS[:500], rows, queries, 0.95)
    assert (measured.recall_at_1, measured.recall_at_10, measured.search) == (1.0, 1.0, {})


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 300), st.integers(0, 300), st.sampled_from(["IDMap2,Flat", "IDMap2,SQ8"]))
def test_adding_equals_building(first: int, more: int, factory: str) -> None:
    rows = np.sign(vectors(first + more)) / 4  # unit-norm, and exact in 8 bits: 20 rows hold both signs in each column
    keys = KEYS[: first + more]
    grown = build(keys[:first], rows[:first], factory)
    add(grown, keys[first:], rows[first:])
    fresh = build(keys, rows, factory)
    assert read_keys(grown).tolist() == read_keys(fresh).tolist()
    np.testing.assert_allclose(search(grown, rows[:5], 3)[0], search(fresh, rows[:5], 3)[0], atol=0.05)
    if factory == "IDMap2,Flat":
        assert to_bytes(grown) == to_bytes(fresh)


def test_adding_to_lists_equals_building_with_the_same_lists() -> None:
    rows = vectors(2000)
    grown, fresh = (build(KEYS[:1000], rows[:1000], "IVF8,Flat") for _ in range(2))
    add(grown, KEYS[1000:1500], rows[1000:1500])
    add(grown, KEYS[1500:], rows[1500:])
    add(fresh, KEYS[1000:], rows[1000:])
    assert grown.ntotal == 2000
    truth = KEYS[np.argsort(-(rows[:30] @ rows.T), axis=1)[:, :10]]
    for index in (grown, fresh):
        assert recall(search(index, rows[:30], 10, {"nprobe": 8})[1], truth) == 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: d[:50] + bytes([d[50] ^ 1]) + d[51:],
        lambda d: d + b"\0",
    ],
)
def test_bytes_that_are_not_those_of_the_card(change) -> None:
    data = to_bytes(build(KEYS[:50], vectors(50), "IDMap2,Flat"))
    digest = hashlib.sha256(data).hexdigest()
    assert from_bytes(data, digest, "x").ntotal == 50
    with pytest.raises(CardError, match=r"image\.faiss") as caught:
        from_bytes(change(data), digest, "v1/image.faiss")
    assert "--rebuild" in caught.value.remedy


def test_what_faiss_cannot_build() -> None:
    with pytest.raises(ClipmillError, match="nonsense") as caught:
        build(KEYS[:10], vectors(10), "nonsense")
    assert "--factory auto" in caught.value.remedy
    with pytest.raises(ClipmillError, match="IVF64"):
        build(KEYS[:10], vectors(10), "IVF64,SQ8")


@pytest.mark.parametrize("queries", [np.zeros((1, 8)), np.zeros(16)])
def test_queries_of_another_dimension(queries: np.ndarray) -> None:
    with pytest.raises(ClipmillError, match="another dimension"):
        search(build(KEYS[:10], vectors(10), "IDMap2,Flat"), queries, 1)


@pytest.mark.parametrize("count", [1, EXACT_UP_TO, EXACT_UP_TO + 1, 2_000_001, 50_000_000])
def test_every_chosen_factory_holds_keys(count: int) -> None:
    """The kind that is chosen for so many vectors, with few lists, over few vectors: it keeps its keys."""
    factory = choose_factory(count, 16)
    start, _, end = factory.partition("IVF")
    small = f"{start}IVF4,{end.partition(',')[2]}" if end else factory
    assert sorted(read_keys(build(KEYS, vectors(2000), small)).tolist()) == sorted(KEYS.tolist())


def test_the_digest_of_keys_knows_no_order() -> None:
    assert keys_sha256(KEYS) == keys_sha256(KEYS[::-1])
    assert keys_sha256(KEYS) != keys_sha256(KEYS[1:])
    assert keys_sha256(np.array([1])) == hashlib.sha256(b"\1" + b"\0" * 7).hexdigest()
