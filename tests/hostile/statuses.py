"""Status lines: whatever a server may begin its answer with."""

# ruff: noqa: RUF001

from __future__ import annotations

from tests.hostile.case import Case, body, head, png, raw, served

_INTERIM = "HTTP/1.1 {}\r\n\r\n"


def _no_image(code: int, words: str, expected: str = "http_4xx") -> Case:
    return served(f"status-{code}", expected, content=b"no", status=f"{code} {words}", http_status=code)


def _line(name: str, expected: str, line: str, *, http_status: int | None = None) -> Case:
    """A picture under this status line."""
    return raw(name, expected, f"{line}\r\nConnection: close\r\n", body(png), http_status=http_status)


def _retry_after(name: str, value: str) -> Case:
    return served(
        f"status-429-{name}", "http_429", f"Retry-After: {value}", content=b"", status="429 Slow", http_status=429
    )


CASES = [
    # 1xx before the answer
    raw("status-100-first", "ok", _INTERIM.format("100 Continue"), head(), body(png)),
    raw("status-102-first", "ok", _INTERIM.format("102 Processing"), 0.3, head(), body(png)),
    raw("status-103-first", "ok", "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n", head(), body(png)),
    raw("status-1xx-five", "ok", _INTERIM.format("100 Continue") * 5, head(), body(png)),
    raw("status-1xx-only", "reset|bad_response|truncated", _INTERIM.format("100 Continue")),
    raw("status-101-unasked", "http_4xx|bad_response|reset",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b"\x81\x05hello"),
    # 2xx, with and without an image
    served("status-200", "ok", http_status=200, size=(24, 16)),
    served("status-201-image", "ok|http_4xx", status="201 Created"),
    _no_image(202, "Accepted", "http_4xx|not_an_image"),
    served("status-203-image", "ok|http_4xx", status="203 Non-Authoritative Information"),
    raw("status-204", "http_4xx|empty_body", head("204 No Content"), "\r\n"),
    raw("status-204-with-body", "http_4xx|empty_body|bad_response", head("204 No Content"), body(png)),
    raw("status-205", "http_4xx|empty_body", head("205 Reset Content", "Content-Length: 0"), "\r\n"),
    served("status-206-unasked", "http_4xx|bad_response|truncated", "Content-Range: bytes 0-50/4000",
           content=lambda own: png(own)[:51], status="206 Partial Content"),
    served("status-206-of-all", "ok|http_4xx", "Content-Range: bytes 0-80/81", status="206 Partial Content"),
    served("status-200-with-range", "ok", "Content-Range: bytes 0-80/81"),
    # 3xx that lead nowhere
    _no_image(300, "Multiple Choices"),
    _no_image(301, "no Location", "http_4xx|bad_response"),
    _no_image(302, "no Location", "http_4xx|bad_response"),
    _no_image(307, "no Location", "http_4xx|bad_response"),
    raw("status-304-unasked", "http_4xx|bad_response", head("304 Not Modified", 'ETag: "x"'), "\r\n"),
    served("status-305-to-canary", "http_4xx|address_refused", "Location: http://<canary>/", content=b"",
           status="305 Use Proxy"),
    served("status-306-to-canary", "http_4xx|address_refused", "Location: http://<canary>/", content=b"",
           status="306 Unused"),
    served("status-300-to-canary", "http_4xx|address_refused", "Location: http://<canary>/", content=b"",
           status="300 Multiple Choices"),
    served("status-201-location", "ok|http_4xx", "Location: http://<canary>/", status="201 Created"),
    served("status-200-location", "ok", "Location: http://<canary>/"),
    # 4xx
    _no_image(400, "Bad Request"),
    served("status-401-basic", "http_4xx", 'WWW-Authenticate: Basic realm="r"', status="401 Unauthorized",
           http_status=401),
    served("status-401-negotiate", "http_4xx", "WWW-Authenticate: Negotiate", "WWW-Authenticate: NTLM",
           status="401 Unauthorized", http_status=401),
    _no_image(402, "Payment Required"),
    _no_image(403, "Forbidden"),
    served("status-404-image", "http_4xx", status="404 Not Found", http_status=404),
    served("status-407", "http_4xx", 'Proxy-Authenticate: Basic realm="r"', content=b"", status="407 Proxy",
           http_status=407),
    _no_image(408, "Request Timeout", "timeout"),
    _no_image(410, "Gone"),
    served("status-413-retry-after", "http_4xx", "Retry-After: 1", content=b"", status="413 Too Large"),
    _no_image(414, "URI Too Long"),
    _no_image(417, "Expectation Failed"),
    _no_image(418, "I'm a teapot"),
    served("status-421", "http_4xx", "Alt-Svc: h2=\"<canary>\"", content=b"", status="421 Misdirected Request"),
    _no_image(425, "Too Early"),
    served("status-426-upgrade", "http_4xx", "Upgrade: h2c", content=b"", status="426 Upgrade Required"),
    _no_image(431, "Request Header Fields Too Large"),
    _no_image(451, "Unavailable For Legal Reasons"),
    _no_image(499, "Client Closed Request"),
    raw("status-404-endless-body", "http_4xx|timeout", head("404 Not Found", "Transfer-Encoding: chunked"), "\r\n",
        b"4000\r\n" + b"x" * 0x4000 + b"\r\n", 30.0, http_status=404),
    # 429: a host that asks for time gets it, but no row waits for it
    served("status-429", "http_429", content=b"", status="429 Too Many Requests", http_status=429),
    _retry_after("seconds", "1"),
    _retry_after("date", "Wed, 21 Oct 2015 07:28:00 GMT"),
    _retry_after("far-date", "Fri, 31 Dec 9999 23:59:59 GMT"),
    _retry_after("nonsense", "when the cows come home"),
    _retry_after("negative", "-5"),
    _retry_after("endless", "9" * 400),
    _retry_after("not-a-number", "nan"),
    # 5xx
    _no_image(500, "Internal Server Error", "http_5xx"),
    _no_image(501, "Not Implemented", "http_5xx"),
    _no_image(502, "Bad Gateway", "http_5xx"),
    served("status-503-retry-after", "http_5xx", "Retry-After: 1000000", content=b"", status="503 Unavailable",
           http_status=503),
    served("status-504-image", "http_5xx", status="504 Gateway Timeout", http_status=504),
    _no_image(511, "Network Authentication Required", "http_5xx"),
    _no_image(526, "Invalid SSL Certificate", "http_5xx"),
    _no_image(599, "Network Connect Timeout", "http_5xx"),
    # Neither of these
    _no_image(600, "Unparseable", "http_4xx|bad_response"),
    _no_image(999, "Request denied", "http_4xx|bad_response"),
    _line("status-099", "bad_response|http_4xx", "HTTP/1.1 099 Early"),
    _line("status-000", "bad_response|http_4xx", "HTTP/1.1 000 Nothing"),
    _line("status-word", "bad_response", "HTTP/1.1 OK 200"),
    _line("status-negative", "bad_response", "HTTP/1.1 -200 OK"),
    _line("status-two-digits", "bad_response|http_4xx", "HTTP/1.1 20 OK"),
    _line("status-four-digits", "bad_response|http_4xx|ok", "HTTP/1.1 2000 OK"),
    _line("status-hex", "bad_response", "HTTP/1.1 0xC8 OK"),
    _line("status-fullwidth", "bad_response|http_4xx", "HTTP/1.1 ２００ OK"),
    _line("status-missing", "bad_response", "HTTP/1.1"),
    # The line itself
    _line("status-no-words", "ok", "HTTP/1.1 200", http_status=200),
    _line("status-binary-words", "ok|bad_response", "HTTP/1.1 200 \x01\x7f\x1b[31m\u2028"),
    _line("status-10-kb-words", "ok|bad_response", "HTTP/1.1 200 " + "O" * 10_000),
    _line("status-1-mb-words", "bad_response|too_large", "HTTP/1.1 200 " + "O" * 1_000_000),
    _line("status-two-spaces", "ok|bad_response", "HTTP/1.1  200 OK"),
    _line("status-tab", "ok|bad_response", "HTTP/1.1\t200\tOK"),
    _line("status-lower-case", "ok|bad_response", "http/1.1 200 ok"),
    _line("status-http-1.0", "ok", "HTTP/1.0 200 OK", http_status=200),
    _line("status-http-1.9", "ok|bad_response", "HTTP/1.9 200 OK"),
    _line("status-http-2-as-text", "ok|bad_response", "HTTP/2 200 OK"),
    _line("status-http-11.1", "bad_response", "HTTP/11.1 200 OK"),
    _line("status-icy", "bad_response", "ICY 200 OK"),
    _line("status-rtsp", "bad_response", "RTSP/1.0 200 OK"),
    _line("status-blank-line-first", "ok|bad_response", "\r\nHTTP/1.1 200 OK"),
    _line("status-space-first", "ok|bad_response", " HTTP/1.1 200 OK"),
    _line("status-bom-first", "bad_response", "\ufeffHTTP/1.1 200 OK"),
]  # fmt: skip
