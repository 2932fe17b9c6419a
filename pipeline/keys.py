"""Sets of keys as sorted arrays without doubles: a fraction of what NumPy's own set routines take, which sort anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]

NONE: Keys = np.empty(0, np.int64)


def among(keys: Keys, these: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``these``, of any shape and in any order, are in ``keys``."""
    if not len(keys):
        return np.zeros(these.shape, np.bool_)
    return np.asarray(keys[np.minimum(np.searchsorted(keys, these), len(keys) - 1)] == these)


def both(keys: Keys, others: Keys) -> Keys:
    """Keys that are in ``others``, too."""
    few, many = sorted((keys, others), key=len)
    return few[among(many, few)]


def minus(keys: Keys, others: Keys) -> Keys:
    """Keys that are not in ``others``."""
    if not len(others) or not len(keys):
        return keys
    if len(others) > len(keys):
        return keys[~among(others, keys)]
    at = np.searchsorted(keys, others)
    at = at[keys[np.minimum(at, len(keys) - 1)] == others]
    return np.delete(keys, at)


def union(*some: NDArray[np.int64]) -> Keys:
    """All keys, each once. They may be given in any order, and several times."""
    keys = np.concatenate([NONE, *some])
    keys.sort(kind="stable")  # what is sorted already is merged
    doubled = keys[1:] == keys[:-1]
    return keys[np.append(True, ~doubled)] if doubled.any() else keys
