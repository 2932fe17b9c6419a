"""How many requests a worker has in flight: as many as the line and the CPU bear, found by climbing."""

from __future__ import annotations

_STEP = 1.5
_IDLE = 0.25
_GAIN = 1.05
_SPAN = 0.5
_REST = 10.0


class Pace:
    """The limit of requests in flight, moved by what it brings.

    More are allowed while all places are taken, the decoders have nothing to do, and the last step up made the
    answers more frequent by 5%; a step that did not is taken back, and tried again ten seconds later. (A line that
    is full, or a host that answers no faster, gains nothing from further requests.)

    A line that brings next to nothing is not what the requests wait for: they wait for slow hosts, and more are allowed
    at once, so that a thousand of those do not stand before the fast ones.
    """

    GLANCE = 0.1
    """Seconds between two looks at the line."""

    def __init__(self, most: int, start: int = 32) -> None:
        self.most = most
        self.limit = min(start, most)
        self._before = self.limit
        self._rate = 0.0
        self._count = 0
        self._since: float | None = None
        self._rest_until = 0.0
        self._wanted = False
        self._looked = -1.0
        self._arrived = 0
        self._fastest = 0.0

    def glance(self, now: float, arrived: int, hungry: bool) -> None:
        """``arrived``: bytes that ever came. ``hungry``: all places are taken, and the decoders have nothing to do."""
        if now - self._looked < self.GLANCE:
            return
        rate = (arrived - self._arrived) / (now - self._looked)
        self._fastest = max(self._fastest, rate)
        if hungry and self._looked >= 0 and rate <= self._fastest * _IDLE:
            self.limit = self._before = min(self.most, int(self.limit * _STEP) + 1)
            self._rate = 0.0
        self._looked, self._arrived = now, arrived

    def answered(self, now: float, hungry: bool) -> None:
        """One request is over. ``hungry``: all places were taken, and no fetched body waited to be decoded."""
        if self._since is None:
            self._since = now
        self._count += 1
        self._wanted |= hungry
        if now - self._since < _SPAN or self._count < self.limit // 2:
            return
        rate = self._count / (now - self._since)
        if self._wanted and now >= self._rest_until:
            self._climb(rate, now)
        self._since, self._count, self._wanted = now, 0, False

    def squeeze(self) -> None:
        """Memory is short: half as many."""
        self.limit = self._before = max(1, self.limit // 2)
        self._rate = 0.0

    def _climb(self, rate: float, now: float) -> None:
        if rate >= self._rate * _GAIN:
            self._before, self._rate = self.limit, rate
            self.limit = min(self.most, int(self.limit * _STEP) + 1)
        else:
            self.limit, self._rate, self._rest_until = self._before, 0.0, now + _REST
