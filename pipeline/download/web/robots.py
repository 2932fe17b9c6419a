"""robots.txt (RFC 9309), asked for once a host and kept: which paths this user agent may fetch."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.robotparser import RobotFileParser

from pipeline.download.web.answers import Fetched
from pipeline.download.web.policy import Target
from schemas.errors import Reason

_KEPT = 20_000


class Robots:
    """The rules of the hosts asked so far, and what waits for those still under way."""

    MAX_BYTES = 512 << 10
    """A longer robots.txt is an error of the host (RFC 9309, 2.5: at least 500 KiB are read)."""

    def __init__(self, user_agent: str) -> None:
        self._agent = user_agent.partition("/")[0]
        self._rules: dict[str, RobotFileParser | Fetched] = {}
        self._parked: dict[str, list[Any]] = {}

    def ask(self, target: Target, task: Any) -> Fetched | Target | None:
        """May ``target`` be fetched? Fetched with reason ok or the refusal; or the robots.txt to fetch first (the
        task is parked, and comes back from :meth:`learn`); or None: it is parked, too, and that is under way."""
        rules = self._rules.get(target.origin)
        if isinstance(rules, Fetched):
            return rules
        if rules is not None:
            allowed = rules.can_fetch(self._agent, target.url)
            return Fetched(Reason.OK) if allowed else Fetched(Reason.ROBOTS_TXT, error=f"{target.origin}/robots.txt")
        parked = self._parked.setdefault(target.origin, [])
        parked.append(task)
        if len(parked) > 1:
            return None
        scheme, place, *_ = urlsplit(target.url)
        return Target(urlunsplit((scheme, place, "/robots.txt", "", "")), target.scheme, target.host, target.port)

    def learn(self, origin: Target, answer: Fetched) -> list[Any]:
        """Keep the answer for a host's robots.txt; what waited for it."""
        if len(self._rules) >= _KEPT:
            self._rules.pop(next(iter(self._rules)))
        self._rules[origin.origin] = self._read(answer)
        return self._parked.pop(origin.origin, [])

    @staticmethod
    def _read(answer: Fetched) -> RobotFileParser | Fetched:
        rules = RobotFileParser()
        if answer.reason in (Reason.OK, Reason.EMPTY_BODY):
            text = answer.body.decode("utf-8", "replace")
            rules.parse(text.splitlines())
            return rules
        if answer.http_status is not None and 400 <= answer.http_status < 500 and not answer.reason.retryable:
            rules.parse([])  # no rules: everything is allowed (2.3.1.3)
            return rules
        # Unreachable: nothing may be fetched (2.3.1.4), and the pair waits for a later run like its robots.txt.
        return Fetched(answer.reason, http_status=answer.http_status, error=f"robots.txt: {answer.error}"[:300])
