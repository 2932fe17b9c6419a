"""robots.txt: asked for once a host, kept, and what its absence means."""

from __future__ import annotations

import pytest

from pipeline.download.web.answers import Fetched
from pipeline.download.web.policy import Target
from pipeline.download.web.robots import Robots
from schemas.errors import Reason

RULES = b"""
User-agent: *
Disallow: /private/

User-agent: clipmill
Disallow: /pictures/
"""


def target(path: str, host: str = "example.com", port: int = 80) -> Target:
    return Target(f"http://{host}:{port}{path}", "http", host, port)


def verdict(answer: Fetched, path: str, agent: str = "clipmill/0.1 (+https://example.org)") -> str:
    robots = Robots(agent)
    asked = robots.ask(target(path), "a task")
    assert asked == target("/robots.txt")
    assert robots.learn(asked, answer) == ["a task"]
    again = robots.ask(target(path), "a task")
    assert isinstance(again, Fetched)
    return str(again.reason)


@pytest.mark.parametrize(
    ("answer", "path", "agent", "expected"),
    [
        (Fetched(Reason.OK, RULES, 200), "/pictures/1.jpg", "clipmill/0.1", "robots_txt"),
        (Fetched(Reason.OK, RULES, 200), "/private/1.jpg", "clipmill/0.1", "ok"),
        (Fetched(Reason.OK, RULES, 200), "/pictures/1.jpg", "another/2", "ok"),
        (Fetched(Reason.OK, RULES, 200), "/private/1.jpg", "another/2", "robots_txt"),
        (Fetched(Reason.OK, b"\xff\xfe no rules \0", 200), "/a.jpg", "clipmill/0.1", "ok"),
        (Fetched(Reason.EMPTY_BODY, http_status=200), "/a.jpg", "clipmill/0.1", "ok"),
        (Fetched(Reason.HTTP_4XX, http_status=404), "/a.jpg", "clipmill/0.1", "ok"),
        (Fetched(Reason.HTTP_4XX, http_status=403), "/a.jpg", "clipmill/0.1", "ok"),
        (Fetched(Reason.HTTP_5XX, http_status=503), "/a.jpg", "clipmill/0.1", "http_5xx"),
        (Fetched(Reason.TIMEOUT), "/a.jpg", "clipmill/0.1", "timeout"),
    ],
)
def test_rules(answer: Fetched, path: str, agent: str, expected: str) -> None:
    assert verdict(answer, path, agent) == expected


def test_asked_for_once_and_for_each_port_apart() -> None:
    robots = Robots("clipmill/0.1")
    first = robots.ask(target("/1.jpg"), 1)
    assert isinstance(first, Target)
    assert robots.ask(target("/2.jpg"), 2) is None
    assert isinstance(robots.ask(target("/3.jpg", port=8080), 3), Target)
    assert robots.learn(first, Fetched(Reason.HTTP_4XX, http_status=404)) == [1, 2]
    assert robots.ask(target("/3.jpg", port=8080), 4) is None, "still under way"
