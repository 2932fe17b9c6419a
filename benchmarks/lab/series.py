"""A short and a long run of one tool, round after round: what one more item costs, start-up apart."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.lab.meter import Cost
from benchmarks.lab.report import Line

Clock = Literal["wall", "cpu"]


@dataclass
class Series:
    """``short`` and ``long``: items of the two runs of a round. ``short=0``: there is no short run (its cost is None),
    and the seconds of the long one are of its work alone."""

    short: int
    long: int
    costs: list[tuple[Cost | None, Cost]] = field(default_factory=list)

    def rates(self, clock: Clock) -> list[float]:
        """Items a second in steady state, of each round; infinite where start-up hides it (few items)."""
        seconds = [getattr(b, clock) - (getattr(a, clock) if a else 0.0) for a, b in self.costs]
        return [(self.long - self.short) / s if s > 0 else math.inf for s in seconds]

    def rate(self, clock: Clock) -> float:
        return statistics.median(self.rates(clock))

    def start_up(self, clock: Clock) -> float:
        """Seconds of the long run that are not its items: the median."""
        return statistics.median(
            getattr(b, clock) - self.long / rate for (_, b), rate in zip(self.costs, self.rates(clock), strict=True)
        )

    def shown(self, clock: Clock, of: str) -> str:
        rates, unit = self.rates(clock), "s" if clock == "wall" else "CPU s"
        return f"{self.rate(clock):,.1f} {of}/{unit} ({min(rates):,.1f}-{max(rates):,.1f})"


def ratio(ours: Series, other: Series, clock: Clock) -> float | None:
    """The median of the rounds' ratios: the two sides of a round ran one after the other, on the machine as it was."""
    pairs = list(zip(ours.rates(clock), other.rates(clock), strict=False))
    if not pairs or not all(map(math.isfinite, (r for pair in pairs for r in pair))):
        return None
    return statistics.median(a / b for a, b in pairs)


def ratio_line(
    what: str, ours: Series, other: Series, clock: Clock, goal: float | None = None, of: str = "pairs"
) -> Line:
    """Rates of both and the ratio, held against ``goal``."""
    return Line(what, ours.shown(clock, of), other.shown(clock, of), ratio(ours, other, clock), goal)
