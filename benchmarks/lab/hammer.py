"""A load of HTTP requests from a process of its own: so many clients, each asking again as soon as it is answered.

    python -m benchmarks.lab.hammer '{"port": 8000, "path": "/v1/search", "bodies": "FILE", "clients": 8, "seconds": 5}'

One thread of uvloop and protocols on bare sockets, so that it is not the limit: its own CPU is in what it prints.
Bodies are a line each and taken in turn. With ``watch`` (a key) and ``delete_at`` (seconds) it deletes that key from a
connection beside, and looks for it in every answer to the first body.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_VERSION = re.compile(rb'"version":\s*"([^"]+)"')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_KEPT_ERRORS = 5


@dataclass
class Load:
    """What is to be asked, and what came of it."""

    port: int
    path: str
    bodies: str
    clients: int
    seconds: float
    warm: float = 1.0
    watch: str = ""
    delete_at: float = 0.0
    taken: list[float] = field(default_factory=list)
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    watched: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("before", "missed", "after", "absent"), 0))
    asked_to_delete: float = float("inf")
    deleted: float = float("inf")
    turn: int = 0

    def __post_init__(self) -> None:
        lines = Path(self.bodies).read_bytes().splitlines()
        self.requests = [self.request("POST", self.path, line) for line in lines]
        self.start = time.perf_counter()
        self.begin, self.end = self.start + self.warm, self.start + self.warm + self.seconds

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.end

    def next(self) -> tuple[int, bytes]:
        number = self.turn % len(self.requests)
        self.turn += 1
        return number, self.requests[number]

    def fail(self, why: str) -> None:
        self.failed += 1
        if len(self.errors) < _KEPT_ERRORS:
            self.errors.append(why[:500])

    def answered(self, number: int, started: float, head: bytes, body: bytes) -> None:
        now = time.perf_counter()
        if head[9:12] != b"200":
            self.fail(head[:40].decode("latin-1") + " " + body[:300].decode("utf-8", "replace"))
            return
        if started >= self.begin:
            self.taken.append(now - started)
        if self.watch:
            self.look(number, started, now, body)

    def look(self, number: int, started: float, now: float, body: bytes) -> None:
        found = _VERSION.search(body[:400])
        if found:
            version = found[1].decode()
            self.versions[version] = self.versions.get(version, 0) + 1
        if number == 0:
            there = f'"{self.watch}"'.encode() in body
            if started > self.deleted:
                self.watched["after" if there else "absent"] += 1
            elif now < self.asked_to_delete:
                self.watched["before" if there else "missed"] += 1

    def result(self, cpu: float) -> dict[str, Any]:
        taken = np.asarray(self.taken or [float("nan")]) * 1e3
        p50, p95, p99 = np.percentile(taken, [50, 95, 99]).tolist()
        return {
            "requests": len(self.taken), "failed": self.failed, "errors": self.errors,
            "per_second": len(self.taken) / self.seconds, "p50": p50, "p95": p95, "p99": p99,
            "most": float(taken.max()), "cpu": cpu, "cpu_us_a_request": 1e6 * cpu / max(self.turn, 1),
            "versions": self.versions, "watched": self.watched,
            "delete_ms": 1e3 * (self.deleted - self.asked_to_delete) if self.watch else None,
        }  # fmt: skip


class Client(asyncio.Protocol):
    """One connection at a time; opened again where the server closes it."""

    def __init__(self, load: Load, done: asyncio.Future[None]) -> None:
        self.load, self.done = load, done
        self.buffer, self.waiting, self.number = b"", False, 0
        self.started = time.perf_counter()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if self.load.over:
            self.transport.close()
            self.finish()
            return
        self.number, request = self.load.next()
        self.waiting = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if found else None
        if length is None or len(body) < int(length[1]):
            return
        self.waiting, self.buffer = False, b""
        self.load.answered(self.number, self.started, head, body)
        closes = b"connection: close" in head.lower() or head.startswith(b"HTTP/1.0")
        self.started = time.perf_counter()
        if closes:
            self.transport.close()
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting:
            self.load.fail(f"connection lost: {exc}")
            self.waiting, self.buffer = False, b""
        if self.load.over:
            self.finish()
        elif not self.done.done():
            self.again = asyncio.get_running_loop().create_task(self.connect())

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    async def connect(self) -> None:
        while not self.load.over:
            self.started = time.perf_counter()
            try:
                await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self.load.port)
            except OSError as exc:
                self.load.fail(f"no connection: {exc}")
                await asyncio.sleep(0.05)
            else:
                return
        self.finish()


async def delete(load: Load) -> None:
    """After ``delete_at`` seconds, on a connection of its own."""
    await asyncio.sleep(load.warm + load.delete_at)
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    load.asked_to_delete = time.perf_counter()
    writer.write(load.request("DELETE", f"/v1/images/{load.watch}"))
    status = await reader.readline()
    load.deleted = time.perf_counter()
    if b" 200 " not in status:
        load.fail(f"DELETE: {status.decode('latin-1')}")
    writer.close()


async def hammer(load: Load) -> None:
    loop = asyncio.get_running_loop()
    done: list[asyncio.Future[None]] = [loop.create_future() for _ in range(load.clients)]
    clients = [Client(load, future) for future in done]
    await asyncio.gather(*(client.connect() for client in clients))
    deletion = loop.create_task(delete(load)) if load.watch else None
    await asyncio.wait(done, timeout=load.warm + load.seconds + 30)
    for future in done:
        if not future.done():
            load.fail("no answer within 30 seconds of the end")
    if deletion is not None:
        await deletion


def main() -> None:
    load = Load(**json.loads(sys.argv[1]))
    gc.disable()
    before = time.process_time()
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(hammer(load))
    print(json.dumps(load.result(time.process_time() - before)))


if __name__ == "__main__":
    main()
