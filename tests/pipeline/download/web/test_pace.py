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
