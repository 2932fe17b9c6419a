"""A hostile web server on 127.0.0.1: every path misbehaves in one way of its own.

What is only bytes and pauses is data (:data:`Step`, see ``tests/hostile``); what counts or asks back is a handler.
"""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image

Handler = Callable[["Reply", str, dict[str, str]], Awaitable[None]]

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF"}


def colour(number: int) -> tuple[int, int, int]:
    """A colour that tells which picture it is (numbers up to 999), 20 steps apart: it survives JPEG."""
    return 25 * (number % 10), 25 * (number // 10 % 10), 25 * (number // 100 % 10)


def picture(number: int, kind: str = "png", size: tuple[int, int] = (24, 16)) -> bytes:
    """An encoded picture of one colour, drawn from its number."""
    out = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(out, FORMATS[kind])
    return out.getvalue()


def number_of(image: bytes) -> int:
    """Which :func:`picture` this is, after any resizing and re-encoding."""
    with Image.open(io.BytesIO(image)) as opened:
        r, g, b = opened.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return round(r / 25) + 10 * round(g / 25) + 100 * round(b / 25)


def png_bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 4096))
        + chunk(b"IEND", b"")
    )


@dataclass(frozen=True)
class Repeat:
    """The same bytes again and again, ``pause`` seconds apart."""

    data: bytes
    times: int
    pause: float = 0.0


class Reset:
    """Close with RST instead of FIN."""


Step = bytes | float | Repeat | Reset
"""What an answer is made of: bytes, pauses in seconds, and how it ends (by default with FIN)."""


def certificate(folder: Path) -> ssl.SSLContext:
    """TLS for 127.0.0.1 with a self-signed certificate, made by the program openssl."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def free_port() -> int:
    """A port of 127.0.0.1 where nobody answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Reply:
    """What a handler answers with: whole replies, or raw bytes."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int, **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    async def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        await self.head(status, **{"Content_Length": str(len(body))} | headers)
        await self.raw(body)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.writer.transport.abort()


async def ok(reply: Reply, path: str, query: dict[str, str]) -> None:
    number, _, kind = path.rpartition("/")[2].partition(".")
    if not number.isdigit() or kind not in FORMATS:
        await reply.send(404)
        return
    await asyncio.sleep(float(query.get("wait", 0)))
    await reply.send(200, picture(int(number), kind), Content_Type="image/x")


async def status(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(int(path.rpartition("/")[2]), b"no")


async def redirect(reply: Reply, path: str, query: dict[str, str]) -> None:
    left = int(path.rpartition("/")[2])
    await reply.send(302, Location=f"/redirect/{left - 1}" if left > 1 else "/ok/7.png")


async def to(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(301, Location=query["url"])


async def loop(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(302, Location="/loop")


async def large_declared(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.head(200, Content_Length="50000000")
    await reply.raw(b"\xff" * 1000)


async def large_streamed(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.head(200, Transfer_Encoding="chunked")
    for _ in range(64):
        await reply.raw(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
    await reply.raw(b"0\r\n\r\n")


async def truncated(reply: Reply, path: str, query: dict[str, str]) -> None:
    body = picture(1)
    await reply.head(200, Content_Length=str(len(body) + 100))
    await reply.raw(body)


async def truncated_chunks(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.head(200, Transfer_Encoding="chunked")
    await reply.raw(b"100\r\nabc")


async def drip(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.head(200, Content_Length="1000")
    for _ in range(600):
        await reply.raw(b"x")
        await asyncio.sleep(0.1)


async def silent(reply: Reply, path: str, query: dict[str, str]) -> None:
    await asyncio.sleep(60)


async def empty(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200)


async def html(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200, b"<!doctype html><html><body>not found</body></html>", Content_Type="image/jpeg")


async def svg(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200, b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')


async def bomb(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200, png_bomb(int(path.rpartition("/")[2])))


async def robots(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200, picture(8), X_Robots_Tag=query["tag"])


async def too_short_length(reply: Reply, path: str, query: dict[str, str]) -> None:
    # In one write: what follows the declared end arrives with it.
    await reply.raw(b"HTTP/1.1 200 X\r\nConnection: close\r\nContent-Length: 40\r\n\r\n" + picture(1))


async def bad_length(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.head(200, Content_Length="-7")
    await reply.raw(picture(1))


async def reset(reply: Reply, path: str, query: dict[str, str]) -> None:
    reply.reset()


async def garbage(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n")


async def damaged(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200, picture(5, "jpg", (200, 200))[:300])


async def gzip_lie(reply: Reply, path: str, query: dict[str, str]) -> None:
    await reply.send(200, b"not gzip at all", Content_Encoding="gzip")


HANDLERS: dict[str, Handler] = {
    "ok": ok, "status": status, "redirect": redirect, "to": to, "loop": loop, "large-declared": large_declared,
    "large-streamed": large_streamed, "truncated": truncated, "truncated-chunks": truncated_chunks, "drip": drip,
    "silent": silent, "empty": empty, "html": html, "svg": svg, "bomb": bomb, "robots": robots,
    "too-short-length": too_short_length, "bad-length": bad_length, "reset": reset, "garbage": garbage,
    "damaged": damaged, "gzip-lie": gzip_lie,
}  # fmt: skip


class Server:
    """``with Server() as s: s.url("ok/1.png")``; ``s.hits`` counts the requests of every path.

    ``/flaky/STATUS/TIMES/REST`` answers STATUS the first TIMES times, and then as /REST does.
    ``/c/NAME`` and everything below it answers ``answers[NAME]``. With ``greeting``, every connection gets that,
    whatever it asks for.
    """

    def __init__(
        self,
        answers: Mapping[str, Sequence[Step]] | None = None,
        *,
        greeting: Sequence[Step] | None = None,
        hosts: Sequence[str] = ("127.0.0.1",),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answers, self.greeting = ({} if answers is None else answers), greeting
        self.hits: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes given to the network for every name in ``answers``."""
        self.heads: list[bytes] = []
        """Every request as it came."""
        self.connections = 0
        self._hosts, self._tls = hosts, tls
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    @property
    def host(self) -> str:
        """For ``--allow-hosts``."""
        return f"127.0.0.1:{self.port}"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self.port = 0
        servers = []
        for host in self._hosts:  # one port for all of them
            started = await asyncio.start_server(
                self._answer, host, self.port, limit=1 << 20, ssl=self._tls, backlog=1024
            )
            self.port = started.sockets[0].getsockname()[1]
            servers.append(started)
        self._ready.set()
        await self._stop.wait()
        for started in servers:
            started.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self.greeting is not None:
                await self._play("", self.greeting, writer)
                return
            first = await reader.readexactly(1)
            if first == b"\x16":  # TLS, which this is not
                await Reply(writer).send(400)
                return
            await self._route(first + await reader.readuntil(b"\r\n\r\n"), writer)
        except asyncio.LimitOverrunError:
            await Reply(writer).send(431)
        except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _route(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        self.heads.append(request)
        target = urlsplit(request.split(b" ")[1].decode("latin-1"))
        path = unquote(target.path).lstrip("/")
        self.hits[path] += 1
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        reply = Reply(writer)
        if path.startswith("flaky/"):
            _, code, times, path = path.split("/", 3)
            if self.hits[target.path.lstrip("/")] <= int(times):
                await reply.send(int(code), b"later", Retry_After="0")
                return
        kind, _, rest = path.partition("/")
        name = rest.partition("/")[0]
        if kind == "c" and name in self.answers:
            self.hits["c/" + name] += path != "c/" + name
            await self._play(name, self.answers[name], writer)
            return
        handler = HANDLERS.get(kind)
        await (handler(reply, path, query) if handler else reply.send(404))

    async def _play(self, name: str, steps: Sequence[Step], writer: asyncio.StreamWriter) -> None:
        """Every step of an answer, no faster than the other end takes it."""
        for step in steps:
            if isinstance(step, Reset):
                writer.transport.abort()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                again = step if isinstance(step, Repeat) else Repeat(step, 1)
                for _ in range(again.times):
                    writer.write(again.data)
                    await writer.drain()
                    self.sent[name] += len(again.data)
                    await asyncio.sleep(again.pause)  # 0, too: the others have their turn
