"""Sets of keys: as Python's own sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.keys import NONE, among, both, minus, union

NUMBERS = st.lists(st.integers(0, 40), max_size=30)


def ordered(numbers: list[int]) -> np.ndarray:
    return np.array(sorted(set(numbers)), np.int64)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_as_pythons_sets(a: list[int], b: list[int], c: list[int]) -> None:
    one, other = ordered(a), ordered(b)
    assert both(one, other).tolist() == sorted(set(a) & set(b))
    assert minus(one, other).tolist() == sorted(set(a) - set(b))
    assert union(*(np.array(some, np.int64) for some in (a, b, c))).tolist() == sorted({*a, *b, *c})
    assert among(one, np.array(b, np.int64)).tolist() == [n in a for n in b]
    assert one.tolist() == sorted(set(a)), "what is given stays as it is"


def test_shapes() -> None:
    assert among(np.array([3, 5]), np.array([[5, 4], [-1, 3]])).tolist() == [[True, False], [False, True]]
    assert union().dtype == union(NONE, NONE).dtype == np.int64
