"""A large index and, beside it, a small one of what came since: the large file stays as it is.

Adding a few vectors to a file costs as much as writing it. Here a night's work is the small file alone; a search goes
over both, and now and then they are made one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.index.building import hidden
from pipeline.keys import NONE, Keys, union


@dataclass(eq=False)
class Extended:
    """``main`` without the keys ``gone`` (sorted), and ``side``: what went from main, and what came or changed."""

    main: Any
    side: Any
    gone: Keys
    _both: tuple[Keys | None, Keys] = field(default=(None, NONE), repr=False)

    @property
    def d(self) -> int:
        """D."""
        return int(self.main.d)

    @property
    def ntotal(self) -> int:
        """Vectors in both, with those that no search finds."""
        return int(self.main.ntotal) + int(self.side.ntotal)

    def without(self, keys: Keys | None) -> Keys:
        """What a search of ``main`` leaves out, if one of both leaves out ``keys``; remembered for that very array."""
        if keys is None:
            return self.gone
        asked, both = self._both
        if asked is not keys:
            both = union(keys, self.gone)
            self._both = keys, both
        return both


def findable(index: Any) -> int:
    """How many vectors of an index a search can find."""
    if isinstance(index, Extended):
        return findable(index.main) - len(index.gone) + findable(index.side)
    return int(index.ntotal) - hidden(index)
