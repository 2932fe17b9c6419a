"""What a case of the hostile corpus is, and short ways of writing one down."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from schemas.errors import Reason
from tests.servers import FORMATS, Repeat, Reset, Step, colour

MAX_BYTES, MAX_PIXELS, MAX_FRAMES, TIMEOUT = 1_000_000, 4_000_000, 1_000, 6.0
"""The limits that the corpus is run under."""

SLACK = 16 << 20
"""Bytes that the kernel's buffers between server and client may swallow beyond what the client reads."""


@dataclass(frozen=True)
class Own:
    """What an answer may be made of: the case's own picture, and the addresses of this run."""

    number: int
    hosts: Mapping[str, str]

    def fill(self, text: str) -> str:
        """``text`` with ``<number>``, ``<server>``, ``<canary>``, ... put in."""
        for name, host in self.hosts.items():
            text = text.replace(f"<{name}>", host)
        return text.replace("<number>", str(self.number))

    def image(self, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
        """The own picture: one colour, drawn from the number."""
        return Image.new("RGB", size, colour(self.number)).convert(mode)

    def encoded(self, kind: str = "png", size: tuple[int, int] = (24, 16), mode: str = "RGB", **how: Any) -> bytes:
        out = io.BytesIO()
        self.image(mode, size).save(out, FORMATS.get(kind, kind), **how)
        return out.getvalue()


Body = bytes | Callable[[Own], bytes]
Part = str | bytes | float | Repeat | Reset | Callable[[Own], bytes]
"""A step, a text to be filled in, or a way of making bytes of the own picture."""


@dataclass(frozen=True)
class Case:
    """One row of the list, and what must become of it."""

    name: str
    expected: frozenset[Reason]
    url: str
    """Filled in by :meth:`Own.fill`; None is a null in the list."""
    parts: tuple[Part, ...] | None = None
    """What the server says at ``/c/NAME``; None: nothing is served there."""
    caption: str | None = ""
    http_status: int | None = None
    """Checked where it is given."""
    number: int = -1
    """Which picture an ok row holds; by default the case's own."""
    size: tuple[int, int] | None = None
    """Original width and height of an ok row; checked where it is given."""
    requests: int = 1
    """At most so many requests may reach ``/c/NAME``."""
    sent: int = MAX_BYTES + SLACK
    """At most so many bytes may the server get rid of."""
    family: str = field(default="", compare=False)

    def own(self, hosts: Mapping[str, str]) -> Own:
        return Own(self.number, hosts)

    def steps(self, hosts: Mapping[str, str]) -> Sequence[Step]:
        """The answer as the server plays it."""
        own = self.own(hosts)
        return [_step(part, own) for part in self.parts or ()]


def _step(part: Part, own: Own) -> Step:
    if isinstance(part, str):
        return own.fill(part).encode()
    return part(own) if callable(part) else part


def case(name: str, expected: str, url: str, **more: Any) -> Case:
    """A case. ``expected`` is a reason, or several with ``|`` between where more than one can be defended."""
    reasons = frozenset(Reason(reason) for reason in expected.split("|"))
    more.setdefault("number", zlib.crc32(name.encode()) % 1000)
    more.setdefault("caption", f"case {name}")
    return Case(name, reasons, url, **more)


def raw(name: str, expected: str, *parts: Part, **more: Any) -> Case:
    """The server answers with exactly these parts."""
    return case(name, expected, more.pop("url", f"http://<server>/c/{name}"), parts=parts, **more)


def png(own: Own) -> bytes:
    """The case's own picture."""
    return own.encoded()


def head(status: str = "200 OK", *headers: str) -> str:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers]) + "\r\n"


def body(content: Body) -> Callable[[Own], bytes]:
    """Content-Length, the empty line, and the content."""

    def whole(own: Own) -> bytes:
        data = content if isinstance(content, bytes) else content(own)
        return f"Content-Length: {len(data)}\r\n\r\n".encode() + data

    return whole


def served(name: str, expected: str, *headers: str, content: Body = png, status: str = "200 OK", **more: Any) -> Case:
    """The server answers with proper HTTP: these headers, this body."""
    return raw(name, expected, head(status, *headers), body(content), **more)


def redirect(
    name: str, expected: str, location: str, *headers: str, status: str = "302 Found", content: Body = b"", **more: Any
) -> Case:
    """The server sends the client to ``location``."""
    return served(name, expected, f"Location: {location}", *headers, status=status, content=content, **more)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """One chunk of a chunked body."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


CHUNKED = head("200 OK", "Transfer-Encoding: chunked") + "\r\n"
OPEN = head() + "\r\n"
"""A head without a length: the body ends with the connection."""
