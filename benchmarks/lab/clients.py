"""One HTTP client fetching many small files: run by the Python of a venv that has it, without the rest of clipmill.

    python clients.py CLIENT URL COUNT FLYING CA_FILE

Fetches URL/0.jpg ... with FLYING requests under way, after a warm-up of as many. Prints one JSON object:
``requests``, ``bytes``, ``cpu`` (user and system seconds of this process), ``wall``, ``connections`` where known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

Get = Callable[[str], Awaitable[bytes]]


class Tally:
    """Requests answered, their bytes, and what they cost since ``start``."""

    def __init__(self) -> None:
        self.requests = self.bytes = self.connections = 0
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def add(self, body: bytes | bytearray) -> None:
        self.requests += 1
        self.bytes += len(body)

    def result(self) -> dict[str, float]:
        return {
            "requests": self.requests, "bytes": self.bytes, "connections": self.connections,
            "cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall,
        }  # fmt: skip


async def pool(get: Get, urls: list[str], flying: int) -> Tally:
    """``flying`` workers, each of which asks for the next URL when its last one is there."""
    tally, todo = Tally(), iter(urls)

    async def worker() -> None:
        for url in todo:
            tally.add(await get(url))

    await asyncio.gather(*(worker() for _ in range(flying)))
    return tally


async def measured(get: Get, urls: list[str], flying: int) -> dict[str, float]:
    await pool(get, urls[:flying], flying)
    return (await pool(get, urls, flying)).result()


async def with_aiohttp(urls: list[str], flying: int, ca: str) -> dict[str, float]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=flying, ssl=ssl.create_default_context(cafile=ca))
    async with aiohttp.ClientSession(connector=connector) as session:

        async def get(url: str) -> bytes:
            async with session.get(url) as response:
                return await response.read()

        return await measured(get, urls, flying)


async def with_httpx(urls: list[str], flying: int, ca: str) -> dict[str, float]:
    import httpx

    limits = httpx.Limits(max_connections=flying)
    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=ca), limits=limits) as client:

        async def get(url: str) -> bytes:
            return (await client.get(url)).content

        return await measured(get, urls, flying)


async def with_rnet(urls: list[str], flying: int, ca: str) -> dict[str, float]:
    import rnet

    client = rnet.Client(verify=False)  # its way of adding a CA changes from version to version: this flatters it

    async def get(url: str) -> bytes:
        return bytes(await (await client.get(url)).bytes())

    return await measured(get, urls, flying)


async def with_primp(urls: list[str], flying: int, ca: str) -> dict[str, float]:
    import primp

    client = primp.AsyncClient(verify=False)  # as above

    async def get(url: str) -> bytes:
        return bytes((await client.get(url)).content)

    return await measured(get, urls, flying)


class Curl:
    """libcurl's multi interface through pycurl, in one thread: its sockets in a selector, as our transport does it."""

    def __init__(self, flying: int, ca: str, version: str, connections: int = 0) -> None:
        import pycurl

        self.pycurl, self.ca = pycurl, ca
        self.version = getattr(pycurl, f"CURL_HTTP_VERSION_{version}")
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_MAXCONNECTS, 2 * flying)
        self.multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, connections)
        self.multi.setopt(pycurl.M_SOCKETFUNCTION, self.on_socket)
        self.multi.setopt(pycurl.M_TIMERFUNCTION, self.on_timer)
        self.selector = selectors.DefaultSelector()
        self.timer: float | None = None
        self.idle = [self.handle() for _ in range(flying)]

    def handle(self) -> Any:
        curl, pycurl = self.pycurl.Curl(), self.pycurl
        for option, value in (
            (pycurl.NOSIGNAL, 1), (pycurl.CAINFO, self.ca), (pycurl.HTTP_VERSION, self.version),
            (pycurl.PIPEWAIT, 1), (pycurl.TIMEOUT_MS, 60_000), (pycurl.PROXY, ""), (pycurl.BUFFERSIZE, 1 << 17),
        ):  # fmt: skip
            curl.setopt(option, value)
        return curl

    def on_socket(self, event: int, descriptor: int, _multi: Any, _data: Any) -> None:
        if event == self.pycurl.POLL_REMOVE:
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(descriptor)
            return
        mask = selectors.EVENT_READ if event & self.pycurl.POLL_IN else 0
        mask |= selectors.EVENT_WRITE if event & self.pycurl.POLL_OUT else 0
        try:
            self.selector.modify(descriptor, mask)
        except KeyError:
            self.selector.register(descriptor, mask)

    def on_timer(self, milliseconds: int) -> None:
        self.timer = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000

    def fetch(self, urls: list[str]) -> Tally:
        tally, todo, under_way = Tally(), iter(urls), 0
        while True:
            while self.idle and (url := next(todo, None)):
                curl = self.idle.pop()
                curl.body, curl.heads = bytearray(), []
                curl.setopt(self.pycurl.URL, url)
                curl.setopt(self.pycurl.WRITEFUNCTION, curl.body.extend)
                curl.setopt(self.pycurl.HEADERFUNCTION, curl.heads.append)
                self.multi.add_handle(curl)
                under_way += 1
            if not under_way:
                return tally
            self.turn()
            under_way -= self.reap(tally)

    def turn(self) -> None:
        wait = 1.0 if self.timer is None else max(0.0, self.timer - time.monotonic())
        for key, event in self.selector.select(wait):
            ready = self.pycurl.CSELECT_IN if event & selectors.EVENT_READ else 0
            ready |= self.pycurl.CSELECT_OUT if event & selectors.EVENT_WRITE else 0
            self.multi.socket_action(key.fd, ready)
        if self.timer is not None and self.timer <= time.monotonic():
            self.timer = None
            self.multi.socket_action(self.pycurl.SOCKET_TIMEOUT, 0)

    def reap(self, tally: Tally) -> int:
        over, queued = 0, 1
        while queued:
            queued, good, bad = self.multi.info_read()
            if bad:
                raise RuntimeError(f"libcurl: {bad[0][1:]}")
            for curl in good:
                tally.add(curl.body)
                tally.connections += int(curl.getinfo(self.pycurl.NUM_CONNECTS))
                self.multi.remove_handle(curl)
                self.idle.append(curl)
            over += len(good)
        return over


def with_pycurl(
    urls: list[str], flying: int, ca: str, version: str, connections: int = 0, *, warm: bool = True
) -> dict[str, float]:
    curl = Curl(flying, ca, version, connections)
    if warm:
        curl.fetch(urls[:flying])
    return curl.fetch(urls).result()


def with_uvloop(urls: list[str], flying: int, ca: str) -> dict[str, float]:
    import uvloop

    return uvloop.run(with_aiohttp(urls, flying, ca))


CLIENTS: dict[str, Callable[[list[str], int, str], dict[str, float]]] = {
    "pycurl": lambda *a: with_pycurl(*a, "1_1"),
    "aiohttp": lambda *a: asyncio.run(with_aiohttp(*a)),
    "aiohttp, uvloop": with_uvloop,
    "httpx": lambda *a: asyncio.run(with_httpx(*a)),
    "rnet": lambda *a: asyncio.run(with_rnet(*a)),
    "primp": lambda *a: asyncio.run(with_primp(*a)),
    # One host: as many connections as a downloader may open there, and one; handshakes included.
    "HTTP/1.1, 8 connections": lambda *a: with_pycurl(*a, "1_1", 8, warm=False),
    "HTTP/2": lambda *a: with_pycurl(*a, "2TLS", 8, warm=False),
}


def main() -> None:
    client, base, count, flying, ca = sys.argv[1:]
    urls = [f"{base}/{i}.jpg" for i in range(int(count))]
    print(json.dumps(CLIENTS[client](urls, int(flying), ca)))


if __name__ == "__main__":
    main()
