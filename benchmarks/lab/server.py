"""A web server of pictures in processes of its own: HTTP/1.1, keep-alive, plain or TLS, some hosts slow.

``http://HOST:PORT/SIZE/NUMBER.jpg`` answers the picture NUMBER modulo as many as there are. NUMBER is put into a
comment of the file, so that no two URLs have the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Site:
    """What is served. ``slow``: addresses that answer after ``delay`` seconds. ``tls``: certificate and key."""

    corpora: dict[str, Path]
    hosts: Sequence[str] = ("127.0.0.1",)
    slow: Sequence[str] = ()
    delay: float = 2.0
    tls: tuple[Path, Path] | None = None
    bodies: dict[str, list[bytes]] = field(default_factory=dict, compare=False)

    MARK: ClassVar[int] = 16
    """Bytes that the comment adds to a file."""

    def load(self) -> None:
        """Read the pictures into memory."""
        for name, folder in self.corpora.items():
            files = sorted(folder.glob("*.jpg"), key=lambda f: int(f.stem))
            self.bodies[name] = [f.read_bytes() for f in files]

    def body(self, path: str) -> bytes | None:
        """The file at ``/SIZE/NUMBER.jpg``, with its number in a comment after the SOI marker."""
        size, _, name = path.strip("/").partition("/")
        pictures, number = self.bodies.get(size), name.removesuffix(".jpg")
        if not pictures or not number.isdigit():
            return None
        body = pictures[int(number) % len(pictures)]
        return b"%b\xff\xfe\x00\x0e%012d%b" % (body[:2], int(number), body[2:])


class _Exchange(asyncio.Protocol):
    """One connection."""

    def __init__(self, site: Site, slow: frozenset[str], loop: asyncio.AbstractEventLoop) -> None:
        self.site, self.slow, self.loop = site, slow, loop
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.is_slow = transport.get_extra_info("sockname")[0] in self.slow

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            if self.is_slow:
                self.loop.call_later(self.site.delay, self._answer, head)
            else:
                self._answer(head)

    def _answer(self, head: bytes) -> None:
        if self.transport.is_closing():
            return
        body = self.site.body(head.split(b" ", 2)[1].decode("latin-1"))
        status = b"200 OK" if body is not None else b"404 Not Found"
        body = body or b""
        close = b"connection: close" in head.lower()
        more = b"Connection: close\r\n" if close else b""
        self.transport.write(
            b"HTTP/1.1 %b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n%b\r\n%b"
            % (status, len(body), more, body)
        )
        if close:
            self.transport.close()


async def _serve(site: Site, sockets: list[socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    context = None
    if site.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*site.tls)
    slow = frozenset(site.slow)
    for sock in sockets:
        await loop.create_server(lambda: _Exchange(site, slow, loop), sock=sock, ssl=context, backlog=4096)
    await asyncio.Event().wait()


def _listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """One listening socket a host, all on the same port."""
    sockets = []
    for host in hosts:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(4096)
        sock.setblocking(False)
        sockets.append(sock)
        port = sock.getsockname()[1]
    return sockets


def _process(site: Site, ready: Connection) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    site.load()
    sockets = _listen([*site.hosts, *site.slow], 0)
    ready.send(sockets[0].getsockname()[1])
    asyncio.run(_serve(site, sockets))


@contextlib.contextmanager
def serving(site: Site) -> Iterator[int]:
    """The port, while the server runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_process, args=(site, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine.recv()
    finally:
        process.kill()
        process.join()


def certificate(folder: Path, hosts: Sequence[str]) -> tuple[Path, Path]:
    """A self-signed certificate for these addresses, and its key. Needs the program openssl."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ",".join(f"IP:{host}" for host in hosts)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
         "-subj", "/CN=clipmill benchmark", "-addext", f"subjectAltName={names}",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def trusted(folder: Path, cert: Path) -> Path:
    """This machine's CA file with ``cert`` added, for SSL_CERT_FILE: a client reads as many CAs as it always does."""
    default = ssl.get_default_verify_paths().cafile
    bundle = folder / "ca.pem"
    bundle.write_text((Path(default).read_text() if default else "") + "\n" + cert.read_text())
    return bundle
