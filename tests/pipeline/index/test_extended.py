"""A large index with a small one beside it: searched as one, it finds what one of both would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index import Extended, build, findable, kind_beside, recall, remove, search
from tests.pipeline.index.data import EXACT, KEYS, LISTS, REFINED, D, neighbours, vectors

ROWS = vectors(2000)
NONE = np.empty(0, np.int64)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    """Whatever came, went, changed, was deleted since or is asked for: the best k of what is there."""
    n, m = data.draw(st.integers(4, 100)), data.draw(st.integers(1, 40))
    places = st.lists(st.integers(0, n - 1), unique=True)
    gone, changed = data.draw(places), data.draw(places.filter(lambda some: len(some) <= m))
    k = data.draw(st.integers(1, 30))
    side_keys = np.append(KEYS[changed], KEYS[1000 : 1000 + m - len(changed)])
    went = np.union1d(KEYS[gone], KEYS[changed])
    index = Extended(
        build(KEYS[:n], ROWS[:n], data.draw(st.sampled_from(["IDMap,Flat", "IVF4,Flat"]))),
        build(side_keys, ROWS[500 : 500 + m], "IDMap,Flat"),
        went,
    )
    left = ~np.isin(KEYS[:n], went)
    keys, rows = np.append(KEYS[:n][left], side_keys), np.append(ROWS[:n][left], ROWS[500 : 500 + m], axis=0)
    assert (index.d, findable(index)) == (D, len(keys))
    without = np.sort(np.array(data.draw(st.lists(st.sampled_from([*keys.tolist(), 1]), unique=True)), np.int64))
    there = ~np.isin(keys, without)
    for given_ in (without, without):  # the second time what is left out is known
        similarity, found = search(index, ROWS[:5], k, {"nprobe": 4}, without=given_)
        np.testing.assert_array_equal(found, neighbours(ROWS[:5], keys[there], rows[there], k))
    assert (np.diff(similarity, axis=1) <= 0).all()
    only = np.sort(keys[::2])
    chosen = there & np.isin(keys, only)
    _, found = search(index, ROWS[:5], k, {"nprobe": 4}, only, without)
    np.testing.assert_array_equal(found, neighbours(ROWS[:5], keys[chosen], rows[chosen], k))


@pytest.mark.parametrize("factory", [EXACT[-1], LISTS[0], *REFINED[:2]])
def test_the_kind_beside_finds_what_is_in_it(factory: str) -> None:
    """Exact beside an exact one; else small codes, of which the best are compared by their vectors."""
    kind = kind_beside(factory, 500, D)
    assert (kind == "IDMap,SQfp16") == (factory in EXACT)
    index = Extended(build(KEYS[:1500], ROWS[:1500], factory), build(KEYS[1500:], ROWS[1500:], kind), NONE)
    exact = neighbours(ROWS[:300], KEYS, ROWS, 10)
    _, found = search(index, ROWS[:300], 10, {"nprobe": 4, "k_factor": 16})
    assert recall(found, exact) >= (0.999 if factory in EXACT else 0.8)
    from_side = np.isin(exact, KEYS[1500:])
    hits = (exact[:, :, None] == found[:, None, :]).any(axis=2)
    assert hits[from_side].mean() >= (0.999 if factory in EXACT else 0.9), "of 16 bits, many are refined"
    assert kind_beside(LISTS[0], 500, 12) == "IDMap,SQfp16", "the small codes are of eight dimensions each"


def test_nothing_beside() -> None:
    """Where something only went, the small index is empty."""
    nothing = build(NONE, ROWS[:0], kind_beside(LISTS[0], 0, D))
    index = Extended(build(KEYS[:50], ROWS[:50], "IDMap,Flat"), nothing, np.sort(KEYS[:3]))
    _, found = search(index, ROWS[:5], 50, {"nprobe": 1})
    assert findable(index) == 47
    np.testing.assert_array_equal(found, neighbours(ROWS[:5], KEYS[3:50], ROWS[3:50], 50))


def test_tombstones_inside_do_not_count() -> None:
    main = build(KEYS[:50], ROWS[:50], "IDMap,HNSW8")
    remove(main, KEYS[:4])
    assert findable(main) == 46
    assert findable(Extended(main, build(KEYS[50:60], ROWS[50:60], "IDMap,SQfp16"), np.sort(KEYS[10:12]))) == 54
