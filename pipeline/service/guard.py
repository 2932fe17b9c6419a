"""What stands before every route, as one piece of ASGI: host, token, sizes, time, load, headers, counting.

No ``BaseHTTPMiddleware``: that one starts a task and a stream for every request.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.requests import Request

from pipeline.service.errors import GONE, Refused, busy, failed, problem_response, refusal
from pipeline.service.metrics import Metrics
from pipeline.service.options import Options
from pipeline.service.routes import JsonRoute

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Straight = Mapping[tuple[str, str], JsonRoute]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = frozenset({"/healthz", "/readyz"})
_OPEN = HEALTH | {"/", "/favicon.ico"}
_PAGE = "/page/"
"""The page has nothing of the data in it, and asks for the token itself."""

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_STRICT = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox")
_NOT_KEPT = (b"cache-control", b"no-store")

log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware. Its errors are the same JSON as the routes'.

    Args:
        straight: routes by (method, path) that are called from here: not through the six layers of the framework, which
            take a quarter of a request's time.
    """

    def __init__(self, app: App, options: Options, metrics: Metrics, straight: Straight) -> None:
        self._app, self._options, self._metrics, self._straight = app, options, metrics, straight
        self._token = options.token.encode() if options.token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        answer = _Answer(send)
        try:
            await self._guarded(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, answer.status, time.perf_counter() - start)

    async def _guarded(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """One request, whatever becomes of it, ends in one answer."""
        try:
            headers = dict(scope["headers"])
            self._admit(scope, headers)
            if scope["path"] in HEALTH:
                await self._app(scope, receive, answer.send)
                return
            if self._metrics.running >= self._options.concurrency:
                raise busy(f"{self._options.concurrency} requests are under way")
            await self._timed(scope, self._counted(headers, receive), answer)
            return
        except GONE:
            return
        except Exception as exc:
            found = refusal(exc)
            if found is None:
                log.exception("%s %s failed", scope["method"], scope["path"])
                found = failed()
            if answer.status:  # the answer has begun: it can only be cut off
                raise
        await problem_response(found, scope["path"])(scope, receive, answer.send)

    async def _timed(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        self._metrics.running += 1
        try:
            async with asyncio.timeout(self._options.timeout) as limit:
                route = self._straight.get((scope["method"], scope["path"]))
                if route is None or route.straight is None:
                    await self._app(scope, receive, answer.send)
                else:
                    scope["route"] = route
                    response = await route.straight(Request(scope, receive))
                    await response(scope, receive, answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Refused(
                504, "timeout", "the request took too long", expected=f"{self._options.timeout:g} s",
                remedy="ask for less at once, or a little later",
            ) from None  # fmt: skip
        finally:
            self._metrics.running -= 1

    # ---- who is let in -----------------------------------------------------------------------------

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises Refused for a strange host, a page of another origin, or a wrong token."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._options.hosts is not None and _name(host) not in self._options.hosts:
            raise Refused(
                400, "host", "this service is not known by that name", expected=", ".join(sorted(self._options.hosts)),
                actual=_name(host),
            )  # fmt: skip
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise Refused(403, "origin", "pages of another origin may not ask", expected=host)
        if self._token is None or scope["path"] in _OPEN or scope["path"].startswith(_PAGE):
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
            raise Refused(
                401, "token", "a token is needed", expected="Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _counted(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """``receive``, which raises Refused once the body is too large: declared or not, and before it is kept."""
        most = self._options.max_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(most, declared.decode())
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                raise _too_large(most, f"more than {most}")
            return message

        return counted


class _Answer:
    """The way out: adds the headers that every answer has, and knows the status once there is one."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            names = {name for name, _ in headers}
            headers += _HEADERS + [header for header in (_STRICT, _NOT_KEPT) if header[0] not in names]
            message = {**message, "headers": headers}
        await self._send(message)


def _name(host: str) -> str:
    """A Host header without its port: ``[::1]:80`` -> ``[::1]``."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


def _too_large(most: int, actual: str) -> Refused:
    return Refused(413, "too_large", "the body is too large", expected=f"{most} bytes", actual=actual)
