"""HTTP exchanges over libcurl: many at once in one thread, each under its caps, each address judged.

libcurl fetched three times as much per CPU-second as aiohttp (docs/decisions/0008), reuses connections, speaks
HTTP/2, and hands every socket's address to us before it connects: nothing can be rebound between the judging and
the connecting.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import certifi
import pycurl

from pipeline.download.web.policy import Refused, Target
from schemas.errors import Reason

_BUFFER = 1 << 17
_CONNECT_SECONDS = 10.0
_DROPPED = 1 << 16
"""Bytes of an unwanted body that are read rather than the connection closed."""
_TLS_CODES = frozenset({35, 51, 53, 54, 58, 59, 60, 64, 66, 77, 80, 82, 83, 90, 91, 98})
_REASONS = {
    pycurl.E_URL_MALFORMAT: Reason.BAD_URL,
    pycurl.E_COULDNT_RESOLVE_HOST: Reason.DNS,
    pycurl.E_COULDNT_CONNECT: Reason.CONNECT,
    pycurl.E_OPERATION_TIMEDOUT: Reason.TIMEOUT,
    pycurl.E_PARTIAL_FILE: Reason.TRUNCATED,
    pycurl.E_UNSUPPORTED_PROTOCOL: Reason.BAD_RESPONSE,  # HTTP/0.9, or something else that is no HTTP
    8: Reason.BAD_RESPONSE,  # CURLE_WEIRD_SERVER_REPLY
    43: Reason.BAD_RESPONSE,  # CURLE_BAD_FUNCTION_ARGUMENT: what a header made of it
    23: Reason.BAD_RESPONSE,  # CURLE_WRITE_ERROR: by its decompression, if not by us
    61: Reason.BAD_RESPONSE,  # CURLE_BAD_CONTENT_ENCODING
    63: Reason.TOO_LARGE,  # CURLE_FILESIZE_EXCEEDED
    100: Reason.BAD_RESPONSE,  # CURLE_TOO_LARGE: headers without end
}


@dataclass(eq=False, slots=True)
class Exchange:
    """One request and what came of it. ``reason`` is ok where an answer arrived whole, whatever its status."""

    target: Target
    seconds: float
    max_bytes: int
    headers: tuple[str, ...] = ()
    owner: Any = None
    reason: Reason = Reason.OK
    error: str | None = None
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    lines: list[bytes] = field(default_factory=list)
    wanted: bool | None = None
    started: float = 0.0
    curl: Any = None

    def settle(self) -> None:
        """Leave the final answer's headers alone (those of informational ones come before), and read its status."""
        start = max((i for i, line in enumerate(self.lines) if line.startswith(b"HTTP/")), default=0)
        del self.lines[:start]
        if not self.status and self.lines:
            code = self.lines[0].split(None, 2)[1:2]
            self.status = int(code[0]) if code and code[0].isdigit() else 0

    @property
    def complete(self) -> bool:
        """Did the headers come to their end?"""
        return any(not line.strip() for line in self.lines)

    def header(self, name: str) -> list[str]:
        """The values of one header of the final answer."""
        wanted = name.lower().encode() + b":"
        found = [line[len(wanted) :].strip() for line in self.lines if line[: len(wanted)].lower() == wanted]
        return [_text(value) for value in found]


class Transport:
    """The exchanges under way. Used by one thread; :meth:`wake` alone may be called from others.

    Args:
        judge: called with (target, address, port) before each connection; raises Refused.
        wants: called once the headers are there: is the body to be read?
    """

    def __init__(
        self,
        judge: Callable[[Target, str, int], None],
        wants: Callable[[Exchange], bool],
        user_agent: str,
        per_host: int,
        places: int,
        http2: bool,
    ) -> None:
        self._judge, self._wants, self._user_agent = judge, wants, user_agent
        self._version = pycurl.CURL_HTTP_VERSION_2TLS if http2 else pycurl.CURL_HTTP_VERSION_1_1
        self._ca = os.environ.get("SSL_CERT_FILE") or certifi.where()
        places = min(places, _descriptors() // 2)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, places)
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, per_host)
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self._poll = selectors.DefaultSelector()
        self._timer: float | None = None
        self._idle: list[Any] = []
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._poll.register(self._ear, selectors.EVENT_READ)
        self.received = 0
        """Bytes of bodies held by exchanges under way."""
        self.arrived = 0
        """Bytes of bodies that ever came."""
        self.flying: dict[Exchange, None] = {}
        self.places = places
        """How many exchanges there may be at once: as asked for, or as the open files allow."""

    def start(self, exchange: Exchange) -> None:
        """Send a request; :meth:`turn` returns it when it is over."""
        curl = self._idle.pop() if self._idle else self._new()
        exchange.curl, exchange.started = curl, time.monotonic()
        curl.exchange = exchange
        milliseconds = max(1, int(exchange.seconds * 1000))
        curl.setopt(pycurl.URL, exchange.target.url)
        curl.setopt(pycurl.TIMEOUT_MS, milliseconds)
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, min(milliseconds, int(_CONNECT_SECONDS * 1000)))
        curl.setopt(pycurl.MAXFILESIZE_LARGE, exchange.max_bytes)
        curl.setopt(pycurl.HTTPHEADER, ["Accept: image/*,*/*;q=0.5", "Accept-Encoding: identity", *exchange.headers])
        curl.setopt(pycurl.WRITEFUNCTION, self._writer(exchange))
        curl.setopt(pycurl.HEADERFUNCTION, exchange.lines.append)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._opener(exchange))
        self._multi.add_handle(curl)
        self.flying[exchange] = None

    def turn(self, timeout: float) -> list[Exchange]:
        """Move on what can move, waiting at most ``timeout`` seconds for it; the exchanges that are over."""
        if self._timer is not None:
            timeout = min(timeout, max(0.0, self._timer - time.monotonic()))
        for key, event in self._poll.select(timeout):
            if key.fileobj is self._ear:
                with suppress(BlockingIOError):
                    self._ear.recv(4096)
                continue
            ready = pycurl.CSELECT_IN if event & selectors.EVENT_READ else 0
            ready |= pycurl.CSELECT_OUT if event & selectors.EVENT_WRITE else 0
            self._multi.socket_action(key.fd, ready)
        if self._timer is not None and self._timer <= time.monotonic():
            self._timer = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        return self._reap()

    def cancel(self, exchange: Exchange) -> None:
        """Drop an exchange under way: its connection is closed."""
        self._release(exchange)

    def wake(self) -> None:
        """End the waiting of :meth:`turn`, from any thread."""
        with suppress(BlockingIOError, OSError):
            self._bell.send(b"x")

    def close(self) -> None:
        for exchange in list(self.flying):
            self._release(exchange)
        for curl in self._idle:
            curl.close()
        self._multi.close()
        self._poll.close()
        self._bell.close()
        self._ear.close()

    def _new(self) -> Any:
        curl = pycurl.Curl()
        for option, value in (
            (pycurl.NOSIGNAL, 1),
            (pycurl.PROXY, ""),  # a proxy would make the connections, and judge no address
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.FOLLOWLOCATION, 0),
            (pycurl.HTTP_VERSION, self._version),
            (pycurl.PIPEWAIT, 1),
            (pycurl.ACCEPT_ENCODING, ""),  # not asked for, but undone where a server sends it all the same
            (pycurl.USERAGENT, self._user_agent),
            (pycurl.CAINFO, self._ca),
            (pycurl.BUFFERSIZE, _BUFFER),
            (pycurl.DNS_CACHE_TIMEOUT, 300),
            (pycurl.TCP_NODELAY, 1),
        ):
            curl.setopt(option, value)
        return curl

    def _writer(self, exchange: Exchange) -> Callable[[bytes], int | None]:
        body, limit = exchange.body, exchange.max_bytes
        dropped = 0

        def write(chunk: bytes) -> int | None:
            nonlocal dropped
            self.arrived += len(chunk)
            if exchange.wanted is None:
                exchange.settle()
                exchange.wanted = self._wants(exchange)
            if not exchange.wanted:  # a little is read to its end: the connection is of use
                dropped += len(chunk)
                return None if dropped <= _DROPPED else -1
            if len(body) + len(chunk) > limit:
                exchange.reason, exchange.error = Reason.TOO_LARGE, f"more than {limit} bytes"
                return -1
            body.extend(chunk)
            self.received += len(chunk)
            return None

        return write

    def _opener(self, exchange: Exchange) -> Callable[..., Any]:
        def open_socket(_purpose: int, address: Any) -> Any:
            family, kind, protocol, where = address
            try:
                self._judge(exchange.target, str(where[0]), int(where[1]))
            except Refused as exc:
                exchange.reason, exchange.error = exc.reason, exc.detail
                return pycurl.SOCKET_BAD
            return socket.socket(family, kind, protocol)

        return open_socket

    def _on_socket(self, event: int, descriptor: int, _multi: Any, known: Any) -> None:
        if event == pycurl.POLL_REMOVE:
            with suppress(KeyError, ValueError):
                self._poll.unregister(descriptor)
            return
        mask = selectors.EVENT_READ if event & pycurl.POLL_IN else 0
        mask |= selectors.EVENT_WRITE if event & pycurl.POLL_OUT else 0
        try:
            self._poll.modify(descriptor, mask)
        except KeyError:
            self._poll.register(descriptor, mask)

    def _on_timer(self, milliseconds: int) -> None:
        self._timer = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000

    def _reap(self) -> list[Exchange]:
        over = []
        queued = 1
        while queued:
            queued, good, bad = self._multi.info_read()
            for curl, code, message in [(curl, 0, "") for curl in good] + bad:
                exchange = curl.exchange
                self._judge_end(exchange, code, message)
                self._release(exchange)
                over.append(exchange)
        return over

    def _judge_end(self, exchange: Exchange, code: int, message: str) -> None:
        exchange.settle()
        if exchange.wanted is False or (code and exchange.complete and exchange.status > 200):
            code = 0  # the status tells enough, whatever became of the body
        if code and exchange.reason is Reason.OK:
            exchange.reason = _REASONS.get(code, Reason.TLS if code in _TLS_CODES else Reason.RESET)
            exchange.error = f"{message or 'libcurl'} ({code})"[:300]
            if code == pycurl.E_RECV_ERROR and "chunk" in message.lower():
                exchange.reason = Reason.BAD_RESPONSE
        elif not code and not exchange.complete:
            exchange.reason, exchange.error = Reason.RESET, "closed within the headers"
        elif not code and exchange.status < 200:
            exchange.reason, exchange.error = Reason.BAD_RESPONSE, f"no final answer: {exchange.lines[0][:80]!r}"
        elif not code:
            # An address was refused, and another one of the same name answered.
            exchange.reason, exchange.error = Reason.OK, None

    def _release(self, exchange: Exchange) -> None:
        del self.flying[exchange]
        self.received -= len(exchange.body)
        curl, exchange.curl = exchange.curl, None
        self._multi.remove_handle(curl)
        # Callbacks would keep the exchange alive until the handle's next use.
        curl.exchange = None
        for option in (pycurl.WRITEFUNCTION, pycurl.HEADERFUNCTION, pycurl.OPENSOCKETFUNCTION):
            curl.unsetopt(option)
        self._idle.append(curl)


def _descriptors() -> int:
    """How many files this process may open; the soft limit is raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
