"""Framing: lengths that lie, chunks that are none, answers that never end, never begin or are no HTTP."""

# ruff: noqa: RUF001

from __future__ import annotations

from tests.hostile.case import (
    CHUNKED,
    MAX_BYTES,
    OPEN,
    TIMEOUT,
    Body,
    Case,
    Own,
    Part,
    body,
    chunk,
    head,
    png,
    raw,
    served,
)
from tests.servers import Repeat, Reset

_LONG = 60.0
_BROKEN = "bad_response|truncated|reset"
"""No whole answer came; which of the three depends on how far a parser reads before it says so."""


def _bmp(own: Own) -> bytes:
    """The own picture as some 10,000 bytes."""
    return own.encoded("bmp", (64, 52))


def _padded(size: int) -> Body:
    return lambda own: png(own).ljust(size, b"\0")


def _length(name: str, expected: str, *values: str) -> Case:
    """The own picture under these Content-Length headers; ``<n>`` is the true length."""

    def headers(own: Own) -> bytes:
        lines = [f"Content-Length:{value}\r\n".replace("<n>", str(len(png(own)))) for value in values]
        return "".join(lines).encode() + b"\r\n" + png(own)

    return raw(f"length-{name}", expected, head(), headers)


def _chunks(name: str, expected: str, *parts: Part, **more: int) -> Case:
    return raw(f"chunks-{name}", expected, CHUNKED, *parts, **more)


def _own_chunk(own: Own) -> bytes:
    return chunk(png(own))


def _spoken(name: str, expected: str, *parts: Part) -> Case:
    """What another protocol would say."""
    return raw(f"spoken-{name}", expected, *parts)


def _header(name: str, expected: str, *lines: Part) -> Case:
    """The own picture, with these lines among the headers."""
    return raw(f"header-{name}", expected, head(), *lines, body(png))


_LENGTHS = [
    _length("right", "ok", " <n>"),
    _length("no-space", "ok", "<n>"),
    _length("zeros", "ok", " 000<n>"),
    _length("spaces", "ok", "  <n>  "),
    _length("twice-the-same", "ok|bad_response", " <n>", " <n>"),
    _length("list-of-the-same", "ok|bad_response", " <n>, <n>"),
    _length("twice-right-and-shorter", "bad_response|truncated|decode", " <n>", " 10"),
    _length("twice-right-and-longer", "bad_response|truncated", " <n>", " 9000"),
    _length("list-of-two", "bad_response|truncated|reset", " <n>, 10"),
    _length("negative", "bad_response|reset", " -7"),
    _length("minus-zero", "bad_response|empty_body|reset", " -0"),
    _length("plus", "bad_response|ok|reset", " +<n>"),
    _length("hex", "bad_response|reset|empty_body|ok", " 0x51"),
    _length("fraction", "bad_response|reset|ok", " <n>.5"),
    _length("word", "bad_response|reset|ok", " many"),
    _length("empty", "bad_response|reset|ok|empty_body", ""),
    _length("fullwidth", "bad_response|reset|ok", " ８１"),
    _length("over-64-bits", "too_large|bad_response|reset", " 18446744073709551697"),
    _length("2-to-63", "too_large|bad_response|reset", " 9223372036854775808"),
    _length("100-digits", "too_large|bad_response|reset", " 1" + "0" * 99),
    _length("1-gib", "too_large", " 1073741824"),
    _length("one-too-many", "truncated", f" {MAX_BYTES}"),
    _length("just-too-large", "too_large", f" {MAX_BYTES + 1}"),
    raw("length-declared-nothing-comes", "truncated|reset|empty_body", head(), "Content-Length: 500\r\n\r\n"),
    raw("length-none-nothing-comes", "empty_body", OPEN),
    raw("length-0-but-a-body", "empty_body|bad_response|reset", head(), "Content-Length: 0\r\n\r\n", png),
    raw("length-40-but-more", "decode|truncated|bad_response|reset", head(), "Content-Length: 40\r\n\r\n", png),
    raw("length-and-garbage-after", "ok|bad_response|reset", head(), body(png), b"\0" * 70_000),
    raw("length-none", "ok", OPEN, png),
    raw("length-none-http-1.0", "ok", "HTTP/1.0 200 OK\r\n\r\n", png),
    # Said to be closed, for the next request would wait on this connection.
    raw("length-but-kept-open", "ok", head(), body(png), _LONG),
    raw("length-none-and-kept-open", "timeout", "HTTP/1.1 200 OK\r\n\r\n", png, _LONG),
    # The answer to the next request of this connection is here already, and wrong: a picture of number 7. In one write:
    # an answer that comes once the next request is sent cannot be told from the one to it.
    raw("length-and-an-answer-too-many", "ok|bad_response|reset",
        lambda own: b"".join(b"HTTP/1.1 200 OK\r\n" + body(o.encoded())(o) for o in (own, Own(7, own.hosts))), 2.0),
    served("length-as-much-as-allowed", "ok", content=_padded(MAX_BYTES)),
    served("length-a-byte-more", "too_large", content=_padded(MAX_BYTES + 1)),
    raw("length-none-a-byte-more", "too_large", OPEN, lambda own: png(own).ljust(MAX_BYTES + 1, b"\0")),
    raw("length-1-gib-and-it-comes", "too_large", head(), "Content-Length: 1073741824\r\n\r\n", png,
        Repeat(bytes(1 << 16), 1 << 14)),
    served("length-with-null-bytes", "ok", content=_padded(60_000)),
]  # fmt: skip

_CHUNKS = [
    _chunks("one", "ok", _own_chunk, b"0\r\n\r\n"),
    _chunks("10000-of-a-byte", "ok", lambda own: b"".join(chunk(bytes([b])) for b in _bmp(own)), b"0\r\n\r\n"),
    _chunks("two-slow-ones", "ok", 0.5, lambda own: chunk(png(own)[:20]), 0.5,
            lambda own: chunk(png(own)[20:]), 0.5, b"0\r\n\r\n"),
    _chunks("extension", "ok", lambda own: chunk(png(own), b";name=\"value\""), b"0;last\r\n\r\n"),
    _chunks("capital-hex", "ok", lambda own: b"%X\r\n%b\r\n" % (len(png(own)), png(own)), b"0\r\n\r\n"),
    _chunks("leading-zeros", "ok|bad_response|reset", lambda own: b"00000000" + chunk(png(own)), b"0\r\n\r\n"),
    _chunks("trailers", "ok", _own_chunk, b"0\r\nX-Checksum: 1\r\nX-Robots-Tag: all\r\n\r\n"),
    _chunks("no-last-one", "truncated", _own_chunk),
    _chunks("no-last-line", "truncated|ok", _own_chunk, b"0\r\n"),
    _chunks("cut", "truncated", b"100\r\nabc"),
    _chunks("cut-in-size", "truncated|bad_response", b"1"),
    _chunks("nothing", "truncated|empty_body|reset", b""),
    _chunks("empty-body", "empty_body", b"0\r\n\r\n"),
    _chunks("size-word", _BROKEN, b"zz\r\nabc\r\n0\r\n\r\n"),
    _chunks("size-negative", _BROKEN, b"-5\r\nabcde\r\n0\r\n\r\n"),
    _chunks("size-0x", _BROKEN + "|empty_body", b"0x5\r\nabcde\r\n0\r\n\r\n"),
    _chunks("size-space", _BROKEN + "|ok", lambda own: b" " + chunk(png(own)), b"0\r\n\r\n"),
    _chunks("size-empty", _BROKEN + "|empty_body", b"\r\n\r\n"),
    _chunks("size-64-bits", _BROKEN + "|too_large", b"FFFFFFFFFFFFFFFF\r\n", Repeat(bytes(1 << 16), 1 << 13)),
    _chunks("size-over-64-bits", _BROKEN + "|too_large", b"1" + b"0" * 30 + b"\r\nabc"),
    _chunks("size-1-gib", "too_large", b"40000000\r\n", Repeat(bytes(1 << 16), 1 << 14)),
    _chunks("size-100-kb-of-zeros", _BROKEN + "|ok", b"0" * 100_000, _own_chunk, b"0\r\n\r\n"),
    _chunks("size-endless-zeros", _BROKEN + "|too_large|timeout", Repeat(b"0" * 65_536, 100_000)),
    _chunks("extension-endless", _BROKEN + "|too_large|timeout", b"5;", Repeat(b"x" * 65_536, 100_000), sent=1 << 33),
    _chunks("trailers-endless", _BROKEN + "|ok|too_large|timeout", _own_chunk, b"0\r\n",
            Repeat(b"X-A: " + b"b" * 60_000 + b"\r\n", 100_000), sent=1 << 33),
    _chunks("trailers-never", "timeout|ok", _own_chunk, b"0\r\n", _LONG),
    _chunks("line-feeds-only", _BROKEN + "|ok", lambda own: b"%x\n%b\n" % (len(png(own)), png(own)), b"0\n\n"),
    _chunks("no-line-end-after", _BROKEN + "|ok", lambda own: b"%x\r\n%b" % (len(png(own)), png(own)), b"0\r\n\r\n"),
    _chunks("longer-than-said", _BROKEN, lambda own: b"5\r\n%b\r\n" % png(own), b"0\r\n\r\n"),
    _chunks("endless", "too_large", Repeat(chunk(b"x" * 16_384), 1_000_000)),
    _chunks("endless-slow", "timeout", Repeat(chunk(b"x"), 1_000, 0.2)),
    raw("chunks-and-length", "ok|bad_response|reset", head("200 OK", "Transfer-Encoding: chunked"),
        "Content-Length: 5\r\n\r\n", _own_chunk, b"0\r\n\r\n"),
    raw("chunks-said-twice", "ok|" + _BROKEN, head("200 OK", "Transfer-Encoding: chunked, chunked"), "\r\n",
        _own_chunk, b"0\r\n\r\n"),
    raw("chunks-misspelt", "not_an_image|" + _BROKEN, head("200 OK", "Transfer-Encoding: xchunked"), "\r\n",
        _own_chunk, b"0\r\n\r\n"),
    raw("chunks-upper-case", "ok", head("200 OK", "TRANSFER-ENCODING: CHUNKED"), "\r\n", _own_chunk, b"0\r\n\r\n"),
    raw("chunks-identity", "ok|bad_response", head("200 OK", "Transfer-Encoding: identity"), body(png)),
    raw("chunks-http-1.0", "ok|not_an_image|bad_response|reset",
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        _own_chunk, b"0\r\n\r\n"),
    raw("chunks-not-said", "not_an_image", OPEN, _own_chunk, b"0\r\n\r\n"),
]  # fmt: skip

_TIMES = [
    raw("slow-nothing", "timeout", _LONG),
    raw("slow-after-status", "timeout", "HTTP/1.1 200 OK\r\n", _LONG),
    raw("slow-after-headers", "timeout", head(), "Content-Length: 500\r\n\r\n", _LONG),
    raw("slow-mid-body", "timeout", head(), "Content-Length: 500\r\n\r\n", png, _LONG),
    raw("slow-last-byte", "timeout", CHUNKED, _own_chunk, b"0\r\n\r", _LONG),
    raw("slow-headers-by-bytes", "timeout", Repeat(b"H", 1, 0.5), b"TTP/1.1 200 OK\r\nX: ", Repeat(b"x", 300, 0.2)),
    raw("slow-headers-by-lines", "timeout", head(), Repeat(b"X-Wait: more\r\n", 300, 0.2)),
    raw("slow-body-by-bytes", "timeout", head(), "Content-Length: 1000\r\n\r\n", Repeat(b"x", 1000, 0.1)),
    raw("slow-body-a-byte-a-second", "timeout", OPEN, Repeat(b"\xff", 100, 1.0)),
    raw("slow-body-in-jumps", "timeout", OPEN, Repeat(b"x" * 1000, 40, 1.5)),
    raw("slow-1xx-for-ever", "timeout|bad_response", Repeat(b"HTTP/1.1 102 Processing\r\n\r\n", 1_000, 0.1)),
    raw("slow-but-in-time", "ok", 0.8, head(), 0.3, "Content-Length: ", lambda own: str(len(png(own))).encode(), 0.3,
        "\r\n\r\n", lambda own: png(own)[:30], 0.3, lambda own: png(own)[30:]),
    raw("slow-header-in-time", "ok", *[part for letter in "HTTP/1.1 200 OK\r\n" for part in (letter, 0.03)],
        "Connection: close\r\n", body(png)),
    raw("reset-at-once", "reset|connect", Reset()),
    raw("reset-in-status", "reset|bad_response", "HTTP/1.1 20", 0.1, Reset()),
    raw("reset-in-headers", "reset|bad_response", head(), "X-Half: ", 0.1, Reset()),
    raw("reset-after-headers", "reset|truncated", head(), "Content-Length: 500\r\n\r\n", 0.1, Reset()),
    raw("reset-in-body", "reset|truncated", head(), "Content-Length: 500\r\n\r\n", png, 0.1, Reset()),
    raw("reset-in-chunk", "reset|truncated", CHUNKED, b"400\r\nabc", 0.1, Reset()),
    raw("reset-without-length", "reset|truncated|ok", OPEN, png, 0.1, Reset()),
    raw("reset-after-all", "ok", head(), body(png), 0.2, Reset()),
    raw("closed-at-once", "reset"),
    raw("closed-in-status", "reset|bad_response", "HTTP/1.1 2"),
    raw("closed-in-headers", "reset|bad_response|truncated", head(), "Content-Type: image/png\r\nX-Half"),
    raw("closed-before-the-empty-line", "reset|bad_response|truncated", head(), "Content-Length: 99\r\n"),
    raw("closed-a-byte-early", "truncated|decode", head(), lambda own: body(png)(own)[:-1]),
    raw("endless-without-length", "too_large", OPEN, png, Repeat(b"x" * 65_536, 100_000)),
    raw("endless-nothing-but-spaces", "bad_response|reset|timeout|too_large", Repeat(b" " * 65_536, 100_000)),
    raw("port-that-says-nothing", "timeout", url="http://<mute>/a.png"),
    raw("port-that-hangs-up", "reset|connect", url="http://<hangup>/a.png"),
    raw("port-that-resets", "reset|connect", url="http://<resets>/a.png"),
    raw("port-that-speaks-first", "bad_response|reset", url="http://<ssh>/a.png"),
    raw("tls-on-a-plain-port", "tls", url="https://<server>/ok/1.png"),
    raw("tls-self-signed", "tls", url="https://<tls>/ok/1.png"),
    raw("tls-wrong-name", "tls|address_refused|dns", url="https://localhost.:<tlsport>/ok/1.png"),
    raw("tls-port-asked-in-plain", "bad_response|reset|http_4xx", url="http://<tls>/ok/1.png"),
    raw("tls-port-that-says-nothing", "timeout|tls", url="https://<mute>/a.png"),
    raw("tls-port-that-hangs-up", "tls|reset|connect", url="https://<hangup>/a.png"),
    raw("tls-port-that-resets", "tls|reset|connect", url="https://<resets>/a.png"),
    raw("tls-port-that-speaks-ssh", "tls", url="https://<ssh>/a.png"),
    raw("tls-port-closed", "connect", url="https://<closed>/a.png"),
]  # fmt: skip

_PROTOCOLS = [
    _spoken("http-0.9", "bad_response|reset", png),
    _spoken("http-0.9-text", "bad_response|reset", b"<html>hello</html>\n"),
    _spoken("http-2-settings", "bad_response|reset", b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x80\0\x04\0\x01\0\0"),
    _spoken("http-2-preface", "bad_response|reset", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    _spoken("http-request", "bad_response|reset", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    _spoken("ftp", "bad_response|reset", b"220 FTP ready\r\n", 0.1),
    _spoken("smtp", "bad_response|reset", b"220 mail ESMTP\r\n250 ok\r\n"),
    _spoken("pop", "bad_response|reset", b"+OK ready\r\n"),
    _spoken("redis", "bad_response|reset", b"-ERR unknown command 'GET'\r\n"),
    _spoken("tls-alert", "bad_response|reset", b"\x15\x03\x03\x00\x02\x02\x28"),
    _spoken("websocket", "bad_response|reset", b"\x81\x7e\x01\x00" + b"a" * 256),
    _spoken("nuls", "bad_response|reset", bytes(100_000)),
    _spoken("newlines", "bad_response|reset|too_large", b"\r\n" * 100_000),
    _spoken("binary", "bad_response|reset", bytes(range(256)) * 50),
    _spoken("binary-endless", "bad_response|reset|too_large|timeout", Repeat(bytes(range(128, 256)) * 512, 100_000)),
    _spoken("garbage-then-http", "bad_response|reset", b"garbage\r\n", head(), body(png)),
    _spoken("half-http", "bad_response|reset", b"HTTP"),
    _spoken("dns", "bad_response|reset", b"\0\x1d\x12\x34\x81\x80\0\x01\0\x01\0\0\0\0"),
]  # fmt: skip

_HEADERS = [
    _header("100000", "bad_response|too_large|ok", Repeat(b"X-Many: 1\r\n" * 1_000, 100)),
    _header("1000", "ok|bad_response", Repeat(b"X-Many: 1\r\n", 1_000)),
    _header("50", "ok", Repeat(b"X-Many: 1\r\n", 50)),
    _header("10-mb", "bad_response|too_large", b"X-Long: ", Repeat(b"x" * 65_536, 160), b"\r\n"),
    _header("10-mb-name", "bad_response|too_large", Repeat(b"x" * 65_536, 160), b": 1\r\n"),
    _header("endless", "bad_response|too_large|timeout", Repeat(b"X-A: b\r\n" * 8_192, 100_000)),
    _header("endless-line", "bad_response|too_large|timeout", b"X-A: ", Repeat(b"b" * 65_536, 100_000)),
    _header("20-kb", "ok|bad_response", "X-Long: " + "x" * 20_000 + "\r\n"),
    _header("folded", "ok|bad_response", "X-Folded: a\r\n  b\r\n\tc\r\n"),
    _header("folded-first", "ok|bad_response", " folded: from nothing\r\n"),
    _header("nul", "ok|bad_response", b"X-Nul: a\0b\r\n"),
    _header("nul-in-name", "ok|bad_response", b"X-\0Nul: a\r\n"),
    _header("no-colon", "ok|bad_response", "there is no colon here\r\n"),
    _header("no-name", "ok|bad_response", ": value\r\n"),
    _header("space-before-colon", "ok|bad_response", "X-Space : a\r\n"),
    _header("no-value", "ok", "X-Empty:\r\n"),
    _header("utf-8", "ok", "X-Text: снег 🦊\r\n"),
    _header("latin-1", "ok", b"X-Text: caf\xe9\r\n"),
    _header("control-characters", "ok|bad_response", b"X-Bell: \x01\x07\x1b[31m\x7f\r\n"),
    _header("carriage-return-inside", "ok|bad_response", b"X-A: a\rX-B: b\r\n"),
    _header("line-feed-ends", "ok|bad_response", "X-A: a\nX-B: b\n"),
    _header("100-cookies", "ok|bad_response", *[f"Set-Cookie: c{i}={'v' * 2_000}\r\n" for i in range(100)]),
    _header("cookie-super", "ok", "Set-Cookie: a=b; Domain=.com; Expires=Fri, 31 Dec 9999 23:59:59 GMT\r\n"),
    _header("etag-100-kb", "ok|bad_response", 'ETag: "' + "e" * 90_000 + '"\r\n'),
    _header("etag-odd", "ok", 'ETag: W/"\u2028\\"\r\nLast-Modified: yesterday\r\n'),
    _header("etag-not-ascii", "ok", 'ETag: "caf\u00e9 🦊"\r\nLast-Modified: gestern, 3 Uhr \u00fc\r\n'),
    _header("date-odd", "ok", "Date: 32 Foo 99999\r\nLast-Modified: Thu, 01 Jan 1970 00:00:00 GMT\r\nAge: -1\r\n"),
    raw("header-line-feeds-only", "ok|bad_response",
        lambda own: b"HTTP/1.1 200 OK\nConnection: close\nContent-Length: %d\n\n" % len(png(own)), png),
    raw("header-none-at-all", "ok", "HTTP/1.1 200 OK\r\n\r\n", png),
    raw("header-keep-alive-odd", "ok|bad_response", "HTTP/1.1 200 OK\r\nConnection: keep-alive, close, upgrade\r\n"
        "Keep-Alive: timeout=99999999999999999999, max=-1\r\n", body(png)),
]  # fmt: skip

CASES = [*_LENGTHS, *_CHUNKS, *_TIMES, *_PROTOCOLS, *_HEADERS]
assert TIMEOUT < _LONG
