"""Keys: known values, and different parts never share one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schemas.keys import candidate_seed, digest, pair_key, pair_keys, prompt_key

TEXTS = st.text(max_size=40)


def test_known_values_never_change() -> None:
    # Written down once: a change here orphans every table that exists.
    assert pair_key("http://a/1.jpg", "a red circle") == 6732906010074077671
    assert pair_key("", "") == 1528207100370152371
    assert prompt_key("a red circle") == 4847134995586064019
    assert candidate_seed("a red circle", 3, 7, "prior") == 276145274024805886
    assert digest("clipmill") == "3adff5cbe608"


@given(TEXTS, TEXTS)
def test_keys_are_non_negative_int64(url: str, caption: str) -> None:
    assert 0 <= pair_key(url, caption) < 2**63
    assert 0 <= prompt_key(caption) < 2**63


@given(st.text(min_size=2, max_size=40), st.data())
def test_where_the_text_is_cut_matters(text: str, data: st.DataObject) -> None:
    """("ab", "c") and ("a", "bc") concatenate to the same text, and are different pairs."""
    first = data.draw(st.integers(0, len(text)))
    second = data.draw(st.integers(0, len(text)).filter(lambda i: i != first))
    assert pair_key(text[:first], text[first:]) != pair_key(text[:second], text[second:])


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=20))
def test_a_column_of_keys_is_the_keys_of_its_rows(rows: list[tuple[str, str]]) -> None:
    keys = pair_keys([u for u, _ in rows], [c for _, c in rows])
    assert keys.dtype == np.int64
    assert keys.tolist() == [pair_key(u, c) for u, c in rows]
    assert len(set(keys.tolist())) == len(set(rows))


def test_kinds_of_keys_are_apart() -> None:
    """The same text as a prompt, a pair and a seed gives unrelated numbers."""
    made = [
        prompt_key("a"),
        pair_key("a", ""),
        pair_key("", "a"),
        candidate_seed("a", 0, 0, "prior"),
        candidate_seed("a", 0, 0, "decoder"),
        candidate_seed("a", 1, 0, "prior"),
        candidate_seed("a", 0, 1, "prior"),
    ]
    assert len(set(made)) == len(made)


def test_lone_surrogates_have_a_key() -> None:
    assert pair_key("\ud800", "x") != pair_key("\ud801", "x")
