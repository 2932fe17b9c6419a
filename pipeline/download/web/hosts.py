"""One host's queue: how many connections it gets, how often it is asked, and when it is taken for dead."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from schemas.errors import Reason

T = TypeVar("T")

_DEAD_SECONDS = 60.0


class Host(Generic[T]):
    """What waits for a host, and what is under way there.

    A host that answers 429 or 503 gets half its places, and one more back with every other answer. A port to
    which three connections in a row failed is asked no more for a minute: the rest fail for the same reason.
    """

    strikes_before_dead = 3

    def __init__(self, name: str, places: int, rate: float) -> None:
        self.name, self.most, self.rate = name, places, rate
        self.places = places
        self.waiting: deque[T] = deque()
        self.active = 0
        self.listed = False
        self.not_before = 0.0
        self._strikes: dict[int, tuple[int, float, Reason]] = {}

    def forgettable(self, now: float) -> bool:
        """Nothing is under way, and nothing of what we know of it matters any more."""
        struck = any(now - since <= _DEAD_SECONDS for _, since, _ in self._strikes.values())
        return not (self.waiting or self.active or self.listed or struck or self.not_before > now)

    def started(self, now: float) -> None:
        self.active += 1
        if self.rate:
            self.not_before = max(self.not_before, now) + 1 / self.rate

    def ended(self, port: int, reason: Reason, now: float) -> None:
        """A request to ``port`` is over."""
        self.active -= 1
        if reason in (Reason.HTTP_429, Reason.HTTP_5XX):
            self.places = max(1, self.places // 2)
        elif self.places < self.most:
            self.places += 1
        if reason in (Reason.CONNECT, Reason.DNS):
            count, _, _ = self._strikes.get(port, (0, 0.0, reason))
            self._strikes[port] = (count + 1, now, reason)
        else:
            self._strikes.pop(port, None)

    def dead(self, port: int, now: float) -> Reason | None:
        """Why ``port`` is not worth asking now, or None."""
        count, since, reason = self._strikes.get(port, (0, 0.0, Reason.OK))
        if count < self.strikes_before_dead or now - since > _DEAD_SECONDS:
            return None
        return reason
