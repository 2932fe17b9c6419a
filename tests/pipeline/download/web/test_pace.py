"""The number of requests in flight: it climbs while that brings more, and no further."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.download.web.pace import Pace


def drive(pace: Pace, rate: Callable[[int], float], seconds: float, hungry: bool = True, start: float = 0.0) -> int:
    """Answers at ``rate(limit)`` a second for some seconds. Returns the highest limit on the way."""
    now, highest = start, pace.limit
    while now < start + seconds:
        now += 1 / rate(pace.limit)
        pace.answered(now, hungry)
        highest = max(highest, pace.limit)
    return highest


def test_slow_hosts_get_all_places() -> None:
    """Each answer takes two seconds: twice the requests are twice the answers."""
    pace = Pace(512)
    drive(pace, lambda limit: limit / 2.0, 60)
    assert pace.limit == 512


def test_a_full_line_gets_no_more() -> None:
    """100 answers a second whatever is asked: one step up, taken back."""
    pace = Pace(512)
    highest = drive(pace, lambda limit: 100.0, 9)
    assert highest <= 32 * 1.5 * 1.5 + 2
    assert pace.limit <= 32 * 1.5 + 1


def test_it_is_tried_again_later() -> None:
    """The line grows after a while: so does the limit."""
    pace = Pace(512)
    drive(pace, lambda limit: 100.0, 30)
    before = pace.limit
    drive(pace, lambda limit: limit / 2.0, 120, start=30)
    assert pace.limit > 2 * before


def test_busy_decoders_need_no_more() -> None:
    pace = Pace(512)
    assert drive(pace, lambda limit: limit / 2.0, 60, hungry=False) == 32


def test_memory_runs_short() -> None:
    pace = Pace(512)
    pace.squeeze()
    assert pace.limit == 16
    for _ in range(10):
        pace.squeeze()
    assert pace.limit == 1
    drive(pace, lambda limit: limit / 2.0, 120)
    assert pace.limit > 16, "it recovers"


def test_never_above_what_is_allowed() -> None:
    assert Pace(4).limit == 4
    pace = Pace(40)
    assert drive(pace, lambda limit: limit / 2.0, 60) == 40


def look(pace: Pace, line: Callable[[float], float], seconds: float, hungry: bool = True, start: float = 0.0) -> None:
    """Glances every eighth of a second at a line that had brought ``line(t)`` bytes by the time t."""
    for tick in range(int(seconds * 8) + 1):
        now = start + tick / 8
        pace.glance(now, int(line(now)), hungry)


def test_an_idle_line_gets_more_at_once() -> None:
    """32 * 1.5^7 > 512: nothing but slow hosts at first."""
    pace = Pace(512)
    look(pace, lambda t: 0.0, 1)
    assert pace.limit == 512


def test_a_busy_line_does_not_by_looks_alone() -> None:
    pace = Pace(512)
    look(pace, lambda t: 1e6 * t, 0.125)
    look(pace, lambda t: 1e6 * t, 60, start=0.25)
    assert pace.limit == 32


def test_a_line_that_falls_silent_gets_more() -> None:
    """Fast hosts for ten seconds; then all places wait for slow ones, which is not what a full line looks like."""
    pace = Pace(512)
    look(pace, lambda t: 1e6 * min(t, 10.0), 10)
    assert pace.limit == 32
    look(pace, lambda t: 1e6 * min(t, 10.0), 1, start=10.125)
    assert pace.limit == 512


def test_an_idle_line_with_free_places_needs_no_more() -> None:
    pace = Pace(512)
    look(pace, lambda t: 0.0, 5, hungry=False)
    assert pace.limit == 32
