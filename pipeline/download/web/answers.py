"""What an answer means: its status, its opt-outs, where it sends us, and when we may come back."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from pipeline.download.web.policy import Policy, Refused
from pipeline.download.web.transport import Exchange
from schemas.errors import Reason

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True)
class Fetched:
    """What became of one URL: ``body`` where ``reason`` is ok, unless it is ``not_modified`` (304)."""

    reason: Reason
    body: bytes = b""
    http_status: int | None = None
    error: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    retry_after: float | None = None
    not_modified: bool = False


def location(exchange: Exchange) -> str | None:
    """Where a redirect leads, or None."""
    if exchange.status not in _REDIRECTS:
        return None
    found = exchange.header("location")
    return found[0] if found and found[0] else None


def wants_body(policy: Policy, exchange: Exchange) -> bool:
    """Asked when the headers are there: is the body worth reading?"""
    return exchange.status == 200 and _opt_out(policy, exchange) is None


def judge_answer(exchange: Exchange, policy: Policy, conditional: bool) -> Fetched:
    """The answer as a result; a redirect is ok without a body, and for the caller to follow."""
    status = exchange.status or None
    if exchange.reason is not Reason.OK:
        return Fetched(exchange.reason, http_status=status, error=exchange.error)
    if exchange.status < 400 and (refused := _opt_out(policy, exchange)):
        return Fetched(refused.reason, http_status=status, error=refused.detail)
    if exchange.status == 304 and conditional:
        return Fetched(Reason.OK, http_status=status, not_modified=True)
    if exchange.status == 200:
        return _whole(exchange)
    if location(exchange):
        return Fetched(Reason.OK, http_status=status)
    wait = _retry_after(exchange) if exchange.status in (429, 503) else None
    return Fetched(_status_reason(exchange.status), http_status=status, error=f"HTTP {status}", retry_after=wait)


def _opt_out(policy: Policy, exchange: Exchange) -> Refused | None:
    try:
        policy.check_robots(exchange.header("x-robots-tag"))
    except Refused as exc:
        return exc
    return None


def _whole(exchange: Exchange) -> Fetched:
    if not exchange.body:
        return Fetched(Reason.EMPTY_BODY, http_status=200, error="empty body")
    etag, modified = exchange.header("etag"), exchange.header("last-modified")
    return Fetched(Reason.OK, bytes(exchange.body), 200, etag=_short(etag), last_modified=_short(modified))


def _status_reason(status: int) -> Reason:
    if status == 408:
        return Reason.TIMEOUT
    if status == 429:
        return Reason.HTTP_429
    return Reason.HTTP_5XX if 500 <= status < 600 else Reason.HTTP_4XX


def _retry_after(exchange: Exchange) -> float | None:
    """Seconds to wait, given as such or as a date; None where there is no sense in it."""
    values = exchange.header("retry-after")
    if not values:
        return None
    if values[0].isascii() and values[0].isdigit():
        return min(float(values[0][:9]), 7 * 86400.0)
    try:
        at = parsedate_to_datetime(values[0])
    except (ValueError, TypeError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
    return min(max((at - dt.datetime.now(dt.UTC)).total_seconds(), 0.0), 7 * 86400.0)


def _short(values: list[str]) -> str | None:
    """A validator to send back: one line, of a length that a header may have."""
    return (
        values[0] if values and 0 < len(values[0]) <= 512 and values[0].isascii() and values[0].isprintable() else None
    )
