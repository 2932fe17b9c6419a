"""Captions drawn from a seed, as long as people's are: what a text encoder's speed depends on is their length.

Their numbers of words have the mean and the deviation of Conceptual Captions' (10.3 and 4.5: Sharma et al. 2018), drawn
from a gamma distribution. No two are the same, so that encoding equal ones once gains nothing here.
"""

from __future__ import annotations

import numpy as np

_MEAN, _DEVIATION = 10.3, 4.5


def _words(text: str) -> list[str]:
    return text.split()


_NOUNS = _words(
    "woman man boy girl dog cat horse bird tree house river mountain beach street city park garden kitchen table chair "
    "window door car bus train bicycle boat bridge tower church museum market shop bottle glass cup plate bowl cake "
    "bread pizza salad apple flower rose leaf forest lake ocean sunset sky cloud snow road field farm fence wall lamp "
    "clock camera laptop phone book guitar piano ball racket helmet jacket dress shirt shoe hat bag ring necklace logo "
    "poster map illustration vector background texture pattern banner actor singer player team crowd child family "
    "couple teacher doctor farmer fisherman dancer artist soldier tourist"
)
_ADJECTIVES = _words(
    "old young small large red blue green yellow white black wooden modern vintage colourful happy beautiful dark "
    "bright quiet busy empty abstract seamless handmade traditional rustic elegant snowy sunny cloudy rainy ancient"
)
_VERBS = _words(
    "sitting standing walking running playing holding looking riding eating drinking reading dancing smiling waiting "
    "sleeping jumping swimming cooking painting singing talking working climbing flying floating hanging growing"
)
_JOINTS = _words("in on near with under behind beside over across during at from against between around")
_ENDS = ("stock photo", "royalty free", "isolated on white", "at night", "close up", "top view", "size 42", "no. 7")


def captions(count: int, seed: int = 0) -> list[str]:
    """``count`` different captions."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_caption(rng)] = None
    return list(found)


def _caption(rng: np.random.Generator) -> str:
    """``a small dog running on an old wooden bridge near ...``, cut to the number of words drawn."""
    length = max(2, round(rng.gamma((_MEAN / _DEVIATION) ** 2, _DEVIATION**2 / _MEAN)))
    words: list[str] = []
    while len(words) < length:
        if words:
            words.append(_one(rng, _VERBS if rng.random() < 0.3 else _JOINTS))
        words += _thing(rng)
    end = _one(rng, _ENDS).split() if rng.random() < 0.15 else []
    kept = [*words[: max(2, length - len(end))], *end]
    return " ".join(kept).capitalize() if rng.random() < 0.3 else " ".join(kept)


def _thing(rng: np.random.Generator) -> list[str]:
    adjectives = [_one(rng, _ADJECTIVES) for _ in range(int(rng.integers(0, 3)))]
    noun = [_one(rng, _NOUNS)]
    article = ["the" if rng.random() < 0.4 else "a"] if rng.random() < 0.7 else []
    return [*article, *adjectives, *noun]


def _one(rng: np.random.Generator, among: list[str] | tuple[str, ...]) -> str:
    return among[int(rng.integers(len(among)))]
