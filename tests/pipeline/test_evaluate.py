"""Labels in captions and zero-shot scores, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate import NO_LABEL, SEVERAL_LABELS, LabelFinder, ZeroShotScores

LABELS = ["dog", "red panda", "red", "Café", "t-shirt"]


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a dog", 0),
        ("DOG!", 0),
        ("a hotdog", NO_LABEL),
        ("dogs", NO_LABEL),
        ("a red panda in a tree", 1),
        ("a red car", 2),
        ("a red panda in a red car", SEVERAL_LABELS),
        ("dog, dog and dog", 0),
        ("a dog in a café", SEVERAL_LABELS),
        ("the CAFÉ", 3),
        ("a T-shirt", 4),
        ("a t shirt", 4),
        ("a panda", NO_LABEL),
        ("", NO_LABEL),
    ],
)
def test_the_one_label_in_a_caption(caption: str, label: int) -> None:
    assert LabelFinder(LABELS)(caption) == label


def test_accuracy_by_hand() -> None:
    scores = ZeroShotScores(["a", "b", "c", "d", "e", "f", "never"])
    eye = np.eye(7, dtype=np.float32)
    down = np.arange(7, 0, -1, dtype=np.float32)  # a is best, then b, ...
    scores.add(np.array([0, 0]), eye[[0, 1]])  # right; taken for b (with a tie of the others behind it)
    scores.add(np.array([4, 5]), np.stack([down, down]))  # fifth; sixth
    scores.add(np.empty(0, np.int64), np.empty((0, 7)))
    found = scores.metrics()
    assert found["rows"] == scores.rows == 4
    assert (found["top1"], found["top5"]) == (1 / 4, 3 / 4)
    assert found["mean_per_class_top1"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert found["per_class"] == {
        "a": {"rows": 2, "top1": 0.5, "top5": 1.0},
        "e": {"rows": 1, "top1": 0.0, "top5": 1.0},
        "f": {"rows": 1, "top1": 0.0, "top5": 0.0},
    }
    names, shares = scores.confusion(2)
    assert names == ["a", "e"]  # of equal ones the first
    np.testing.assert_array_equal(shares, [[0.5, 0], [1, 0]])
    assert scores.confusion(20)[0] == ["a", "e", "f"]
