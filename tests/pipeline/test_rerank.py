"""Ranks and scores by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rerank import clip_scores, ranks


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], []),
        ([0.5], [1]),
        ([0.1, 0.3, 0.2], [3, 1, 2]),
        ([0.2, 0.2, 0.2], [1, 2, 3]),
        ([0.1, 0.9, 0.1, 0.9], [3, 1, 4, 2]),
        ([-1.0, 0.0, -0.5], [3, 1, 2]),
    ],
)
def test_ranks(scores: list[float], expected: list[int]) -> None:
    assert ranks(np.array(scores, np.float32)).tolist() == expected


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=30))
def test_ranks_agree_with_sorting(scores: list[float]) -> None:
    found = ranks(np.array(scores)).tolist()
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert [found[i] for i in best_first] == list(range(1, len(scores) + 1))


def test_scores_are_cosines_of_each_with_its_own() -> None:
    pictures = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    text = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(clip_scores(pictures, text), [1.0, 0.6, -1.0], rtol=1e-6)
