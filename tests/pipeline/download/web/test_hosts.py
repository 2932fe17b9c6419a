"""One host's queue: places given and taken back, a rate, and when it is taken for dead."""

from __future__ import annotations

from pipeline.download.web.hosts import Host
from schemas.errors import Reason


def test_a_host_in_trouble_gets_fewer_places() -> None:
    host: Host[int] = Host("a", 8, 0.0)
    for reason, places in [
        (Reason.OK, 8), (Reason.HTTP_429, 4), (Reason.HTTP_5XX, 2), (Reason.HTTP_429, 1), (Reason.HTTP_429, 1),
        (Reason.OK, 2), (Reason.HTTP_4XX, 3),
    ]:  # fmt: skip
        host.started(0.0)
        host.ended(80, reason, 0.0)
        assert (host.places, host.active) == (places, 0)


def test_a_rate_spaces_the_requests() -> None:
    host: Host[int] = Host("a", 8, 4.0)
    times = []
    now = 10.0
    for _ in range(4):
        now = max(now, host.not_before)
        times.append(now)
        host.started(now)
    assert times == [10.0, 10.25, 10.5, 10.75]


def test_three_failed_connections_and_it_is_dead_for_a_minute() -> None:
    host: Host[int] = Host("a", 8, 0.0)
    for strike in range(3):
        assert host.dead(80, 1.0) is None, f"after {strike} failures"
        host.started(1.0)
        host.ended(80, Reason.CONNECT, 1.0)
    assert host.dead(80, 2.0) is Reason.CONNECT
    assert host.dead(443, 2.0) is None, "another port is another server"
    assert host.dead(80, 62.0) is None


def test_an_answer_clears_it_and_slow_answers_are_no_strikes() -> None:
    host: Host[int] = Host("a", 8, 0.0)
    for reason in (Reason.CONNECT, Reason.DNS, Reason.HTTP_4XX, Reason.CONNECT, *[Reason.TIMEOUT] * 5):
        host.started(0.0)
        host.ended(80, reason, 0.0)
    assert host.dead(80, 0.0) is None


def test_what_may_be_forgotten() -> None:
    host: Host[int] = Host("a", 8, 2.0)
    assert host.forgettable(0.0)
    host.started(0.0)
    assert not host.forgettable(10.0), "under way"
    host.ended(80, Reason.CONNECT, 10.0)
    assert not host.forgettable(11.0), "a strike"
    assert host.forgettable(71.0)
    host.waiting.append(1)
    assert not host.forgettable(71.0)
    host.waiting.clear()
    host.not_before = 72.0
    assert not host.forgettable(71.0), "its rate"
