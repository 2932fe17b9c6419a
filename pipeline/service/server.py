"""uvicorn in a thread of its own, on a socket that several processes may share."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from schemas.errors import ClipmillError, UsageError

_KEEP_ALIVE = 75
"""Seconds: longer than the 60 of usual reverse proxies, which would else write into a connection just closed."""
_MOST_HEAD = 64 << 10
_START = 60.0


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host and port (0: any free one), not yet listening. Others of this user may bind it, too.

    Raises:
        UsageError: no such address here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as exc:
        raise UsageError(
            f"cannot listen on {host}:{port}", actual=str(exc), remedy="choose another --port (0: any free one)"
        ) from exc
    return bound


def require_free(host: str, port: int) -> None:
    """Raises UsageError where anybody listens there, even one who would share: another service must not get half."""
    if port == 0:
        return
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as exc:
            raise UsageError(
                f"cannot listen on {host}:{port}", actual=str(exc), remedy="choose another --port (0: any free one)"
            ) from exc


class Server:
    """An ASGI app, served from a thread until :meth:`stop`.

    Args:
        bound: see :func:`bind`.
        grace: seconds that requests under way have to end.
    """

    def __init__(self, app: Any, bound: socket.socket, grace: float) -> None:
        self._grace = grace
        config = uvicorn.Config(
            app, http=_Protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=round(grace),
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, args=([bound],), name="http", daemon=True)

    def start(self) -> None:
        """Returns when it listens. Raises ClipmillError if it does not within a minute."""
        self._thread.start()
        end = time.monotonic() + _START
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise ClipmillError("the HTTP server did not start", remedy="its log says why")
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no new connections, answer what is under way, end. Again, it does nothing."""
        self._uvicorn.should_exit = True
        if self._thread.is_alive():
            self._thread.join(self._grace + 5)


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with a limit to a request's head, which httptools has not."""

    _head: int | None = 0
    """Bytes since the head began; None: it is complete."""

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            if self._head > _MOST_HEAD:
                self.send_400_response("The request's head is too large.")
                return
            self._head += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head = 0
