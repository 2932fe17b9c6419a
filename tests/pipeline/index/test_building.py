"""Adding, merging and removing: each kind of index ends as if it had been built so at once."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index import (
    add,
    build,
    from_bytes,
    hidden,
    lists,
    merge,
    read_keys,
    recall,
    remove,
    sample,
    sample_size,
    search,
    to_bytes,
    train,
)
from schemas.errors import ClipmillError
from tests.pipeline.index.data import ALL, EXACT, KEYS, LAYERED, LISTS, D, circle, neighbours, vectors
from tests.pipeline.index.test_files import sha256

DEEP = {"nprobe": 4, "k_factor": 32}
ROWS = vectors(2000)


def copied(index):
    """The same index, once more."""
    data = to_bytes(index)
    return from_bytes(data, sha256(data), "a copy")


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 300), st.integers(0, 300), st.sampled_from(["IDMap,Flat", "IDMap,SQ8"]))
def test_adding_equals_building(first: int, more: int, factory: str) -> None:
    rows = np.sign(vectors(first + more)) / 4  # unit-norm, and exact in 8 bits: 20 rows hold both signs in each column
    keys = KEYS[: first + more]
    grown = build(keys[:first], rows[:first], factory)
    add(grown, keys[first:], rows[first:])
    fresh = build(keys, rows, factory)
    assert read_keys(grown).tolist() == read_keys(fresh).tolist()
    np.testing.assert_allclose(search(grown, rows[:5], 3)[0], search(fresh, rows[:5], 3)[0], atol=0.05)
    if factory == "IDMap,Flat":
        assert to_bytes(grown) == to_bytes(fresh)


@pytest.mark.parametrize("factory", ALL)
def test_merged_shards_equal_a_single_build(factory: str) -> None:
    """With the same trained quantiser: the same keys and similarities, bit for bit."""
    trained = train(ROWS[:1500], factory)
    whole, merged = copied(trained), copied(trained)
    add(whole, KEYS, ROWS)
    for start, end in ((0, 700), (700, 701), (701, 701), (701, 2000)):
        shard = copied(trained)
        add(shard, KEYS[start:end], ROWS[start:end])
        merge(merged, shard)
    assert merged.ntotal == whole.ntotal == 2000
    assert read_keys(merged).tolist() == read_keys(whole).tolist()
    queries = vectors(40, seed=1)
    for parameters in ({"nprobe": 2, "k_factor": 2}, DEEP):
        for a, b in zip(search(merged, queries, 20, parameters), search(whole, queries, 20, parameters), strict=True):
            np.testing.assert_array_equal(a, b)
    assert copied(merged).ntotal == 2000


@pytest.mark.parametrize("factory", ALL)
def test_what_is_removed_is_not_found(factory: str) -> None:
    index = build(KEYS, ROWS, factory)
    gone = KEYS[::3]
    assert remove(index, np.sort(gone)) == len(gone)
    assert remove(index, gone) == 0
    left = np.setdiff1d(KEYS, gone)
    for each in (index, copied(index)):
        assert sorted(read_keys(each).tolist()) == left.tolist()
        assert each.ntotal - hidden(each) == len(left)
        _, found = search(each, ROWS[:60], 10, DEEP)
        assert not np.isin(found, gone).any()
        assert (found >= 0).all(), "there are ten for everybody"
        assert not np.isin(search(each, ROWS[:2], 2000, DEEP)[1], gone).any()
    if factory in EXACT:
        kept = np.isin(KEYS, left)
        assert recall(search(index, ROWS[:60], 10)[1], neighbours(ROWS[:60], KEYS[kept], ROWS[kept], 10)) > 0.99


@pytest.mark.parametrize("factory", ALL)
def test_a_changed_vector_is_found_where_it_is_now(factory: str) -> None:
    index = build(KEYS, ROWS, factory)
    changed, other = KEYS[:5], -ROWS[:5]
    remove(index, changed)
    add(index, changed, other)
    near = (
        100 if factory in (*LISTS, *LAYERED) else 1
    )  # those with few bits of 16 dimensions find little more than the direction
    similarity, found = search(index, other, near, DEEP)
    assert all(key in row for key, row in zip(changed, found, strict=True))
    assert sorted(read_keys(index).tolist()) == sorted(KEYS.tolist()), "every key once"
    _, before = search(index, ROWS[:5], 50, DEEP)
    assert not any(key in row for key, row in zip(changed, before, strict=True)), "and not where it was"
    assert (np.diff(similarity, axis=1) <= 0).all()


@pytest.mark.parametrize("factory", ALL)
def test_keys_and_bytes_round_trip(factory: str) -> None:
    index = build(KEYS, ROWS, factory)
    assert sorted(read_keys(index).tolist()) == sorted(KEYS.tolist())
    for a, b in zip(search(index, ROWS[:9], 5), search(copied(index), ROWS[:9], 5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_index_has_no_keys() -> None:
    for factory in ("IDMap,SQfp16", "IVF4,SQ8"):
        index = train(ROWS, factory)
        assert read_keys(index).tolist() == [] and remove(index, KEYS) == 0
        assert search(index, ROWS[:2], 3)[1].tolist() == [[-1] * 3] * 2


def test_adding_to_lists_equals_building_with_the_same_lists() -> None:
    grown, fresh = (build(KEYS[:1000], ROWS[:1000], "IVF8,Flat") for _ in range(2))
    add(grown, KEYS[1000:1500], ROWS[1000:1500])
    add(grown, KEYS[1500:], ROWS[1500:])
    add(fresh, KEYS[1000:], ROWS[1000:])
    assert grown.ntotal == 2000
    truth = neighbours(ROWS[:30], KEYS, ROWS, 10)
    for index in (grown, fresh):
        assert recall(search(index, ROWS[:30], 10, {"nprobe": 8})[1], truth) == 1.0


def test_float16_is_added_as_it_is() -> None:
    half = ROWS.astype(np.float16)
    index = build(KEYS, half, "IDMap,SQfp16")
    similarity, found = search(index, half[:20], 1)
    assert found[:, 0].tolist() == KEYS[:20].tolist()
    exact = np.einsum("nd,nd->n", half[:20].astype(np.float32), half[:20].astype(np.float32))
    np.testing.assert_allclose(similarity[:, 0], exact, atol=1e-6)


def test_the_sample_is_seeded_and_bounded() -> None:
    assert sample_size("IDMap,SQfp16", D) == sample_size("IDMap,Flat", D) == 0, "nothing to train"
    assert sample_size("IVF1024,SQ8", D) == 64 * 1024
    assert sample_size("IVF1048576,SQ8", 1024) * 1024 * 4 <= 4 << 30
    chosen = sample(1000, 100)
    assert len(set(chosen.tolist())) == 100 and chosen.min() >= 0 and chosen.max() < 1000
    np.testing.assert_array_equal(chosen, sample(1000, 100))
    assert sorted(sample(10, 100).tolist()) == list(range(10))


def test_lists() -> None:
    assert lists(build(KEYS, ROWS, "IDMap,IVF4,PQ4x4fsr,Refine(SQ8)")) == 4
    assert lists(build(KEYS[:6], circle(6), "IDMap,Flat")) == 1


def test_what_faiss_cannot_build() -> None:
    with pytest.raises(ClipmillError, match="nonsense") as caught:
        build(KEYS[:10], vectors(10), "nonsense")
    assert "--factory auto" in caught.value.remedy
    with pytest.raises(ClipmillError, match="IVF64"):
        build(KEYS[:10], vectors(10), "IVF64,SQ8")


@pytest.mark.parametrize("factory", ["PCA16,Flat", "PCAR16,Flat", "PCA16,IVF4,Flat"])
def test_a_rotation_keeps_inner_products(factory: str) -> None:
    """All vectors lie about one direction, as CLIP's do: a PCA that took their mean away would change the order."""
    rows = ROWS + 0.5 * np.eye(D, dtype=np.float32)[0]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = build(KEYS, rows, f"IDMap,{factory}")
    similarity, found = search(index, rows[:50], 5, DEEP)
    np.testing.assert_array_equal(found, neighbours(rows[:50], KEYS, rows, 5))
    np.testing.assert_allclose(similarity[:, 0], 1.0, atol=1e-5)


def test_four_bits_are_not_spent_on_the_few_that_are_far_out() -> None:
    rows = vectors(2000, 64, seed=5)
    rows[::100] = np.eye(64, dtype=np.float32)[:20]
    exact, every = neighbours(rows[1:300], KEYS, rows, 10), {"nprobe": 4}
    plain = faiss.index_factory(64, "IVF4,SQ4", faiss.METRIC_INNER_PRODUCT)
    plain.train(rows)
    plain.add_with_ids(rows, KEYS)
    ours, theirs = (
        recall(search(index, rows[1:300], 10, every)[1], exact) for index in (build(KEYS, rows, "IVF4,SQ4"), plain)
    )
    assert ours > theirs
