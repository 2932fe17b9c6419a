"""Content-derived keys: the join key everywhere and the FAISS id. Nothing is joined by row position."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 63) - 1


def _hash63(*parts: str) -> int:
    h = blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return int.from_bytes(h.digest(), "little") & _MASK


def pair_key(url: str, caption: str) -> int:
    """Non-negative int64 of (url, caption)."""
    return _hash63("pair", url, caption)


def pair_keys(urls: Iterable[str], captions: Iterable[str]) -> NDArray[np.int64]:
    """:func:`pair_key` of each row, int64[N]."""
    return np.fromiter((pair_key(u, c) for u, c in zip(urls, captions, strict=True)), dtype=np.int64)


def prompt_key(prompt: str) -> int:
    """Non-negative int64 of a prompt."""
    return _hash63("prompt", prompt)


def candidate_seed(prompt: str, number: int, seed: int, purpose: str) -> int:
    """Seed of one candidate's noise: a function of (prompt, number, seed) alone, so that a candidate
    does not depend on batch, shard, worker or retry. ``purpose`` separates prior from decoder noise."""
    return _hash63("candidate", prompt, str(number), str(seed), purpose)


def digest(text: str, length: int = 12) -> str:
    """Short hexadecimal digest of a text, for names of shards, runs and configs."""
    return blake2b(text.encode(), digest_size=16).hexdigest()[:length]
