"""Measuring: recall and latency, of one index and of a small one beside a large one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from pipeline.index import Answers, Extended, Truth, build, measure, recall
from schemas.errors import CardError
from tests.pipeline.index.data import KEYS, REFINED, vectors

ROWS, QUERIES = vectors(2000), vectors(50, seed=1)
NONE = np.empty(0, np.int64)


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


def test_equal_vectors_do_not_lower_the_recall() -> None:
    """A caption of many pairs: which of them a search returns is all the same."""
    rows = np.repeat(ROWS[:20], 100, axis=0)
    point = measure(build(KEYS, rows, "IDMap,SQfp16"), Truth.of(QUERIES, [(KEYS[::-1], rows[::-1])]), {})
    assert (point.recall_at_1, point.recall_at_10, point.recall_at_100) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("factory", ["IVF16,SQ8", REFINED[0], "IDMap,SQfp16"])
def test_what_lies_beside_is_measured_without_the_large_one(factory: str, own: bool) -> None:
    """As both together are, searched anew; where keys have gone, by no more than these better than it is."""
    queries = ROWS[100:150] if own else QUERIES
    mine = KEYS[100:150] if own else None
    search = {"nprobe": 3, "k_factor": 4}
    main, side = build(KEYS[:1500], ROWS[:1500], factory), build(KEYS[1500:], ROWS[1500:], "IDMap,SQfp16")
    answers = Answers.of(main, Truth.of(queries, [(KEYS[:1500], ROWS[:1500])], mine), search)
    truth = Truth.of(queries, [(KEYS, ROWS)], mine)
    point, expected = (
        answers.beside(side, NONE, truth).point(truth, search),
        measure(Extended(main, side, NONE), truth, search),
    )
    assert point.model_dump(exclude={"ms_per_query"}) == expected.model_dump(exclude={"ms_per_query"})
    assert point.search == search and point.ms_per_query > answers.ms
    gone = np.sort(KEYS[:20])
    left = Truth.of(queries, [(KEYS[20:], ROWS[20:])], mine)
    fewer = answers.beside(side, gone, left).point(left, search)
    really = measure(Extended(main, side, gone), left, search)
    for name in ("recall_at_1", "recall_at_10", "recall_at_100"):
        assert getattr(really, name) - 0.2 <= getattr(fewer, name) <= getattr(really, name)


def test_answers_in_a_file(tmp_path: Path) -> None:
    path = UPath(tmp_path) / "new" / "answers.npz"
    truth = Truth.of(QUERIES, [(KEYS, ROWS)])
    answers = Answers.of(build(KEYS, ROWS, "IVF16,SQ8"), truth, {"nprobe": 3})
    answers.save(path)
    assert Answers.load(path).point(truth, {}) == answers.point(truth, {})
    truth.save(path)
    with pytest.raises(CardError, match="is not what was written"):
        Answers.load(path)
