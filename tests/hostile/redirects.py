"""Redirects: every one is judged like a URL of the list, and none is followed that is only in the page."""

# ruff: noqa: RUF001

from __future__ import annotations

from typing import Any

from tests.hostile.case import MAX_BYTES, Case, body, head, png, raw, redirect, served
from tests.servers import Repeat

_GOOD = "http://<server>/ok/<number>.png"
_CANARY = "http://<canary>/ok/1.png"
_META = b"<html><head><meta http-equiv='refresh' content='0;url=http://CANARY/'></head></html>"

# name -> the host of a private address; 7 is the canary's port
_PRIVATE = {
    "ipv4": "<canary>", "name": "localhost:<cport>", "name-dot": "localhost.:<cport>", "ipv6": "[::1]:<cport>",
    "short": "127.1:<cport>", "hex": "0x7f.1:<cport>", "decimal": "2130706433:<cport>",
    "octal": "0177.0.0.1:<cport>", "any": "0.0.0.0:<cport>", "any-short": "0:<cport>", "any6": "[::]:<cport>",
    "mapped": "[::ffff:127.0.0.1]:<cport>", "nat64": "[64:ff9b::7f00:1]:<cport>", "other-loopback": "127.9.9.9:<cport>",
    "metadata": "169.254.169.254", "ten": "10.0.0.1", "172": "172.16.0.1", "192": "192.168.1.1",
    "shared": "100.64.0.1", "benchmark": "198.18.0.1", "multicast": "224.0.0.1", "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255", "unique-local": "[fc00::1]", "link-local": "[fe80::1]",
    "documentation": "192.0.2.1",
}  # fmt: skip

_OTHER_SCHEMES = {
    "file": "file:///etc/passwd", "file-upper": "FILE:///etc/passwd", "ftp": "ftp://<canary>/a.png",
    "data": "data:image/png;base64,iVBORw0KGgo=", "javascript": "javascript:alert(1)",
    "gopher": "gopher://<canary>/_GET%20/", "dict": "dict://<canary>/d:x", "smb": "smb://<canary>/share/a.png",
    "ldap": "ldap://<canary>/", "tftp": "tftp://<canary>/a.png", "scp": "scp://<canary>/a.png",
    "ws": "ws://<canary>/", "mailto": "mailto:nobody@example.com", "about": "about:blank", "s3": "s3://bucket/a.png",
    "view-source": "view-source:http://<canary>/",
}  # fmt: skip


def _code(status: int) -> Case:
    return redirect(f"redirect-{status}", "ok", _GOOD, status=f"{status} Moved", http_status=200)


def _good(name: str, location: str, expected: str = "ok", *headers: str, **more: Any) -> Case:
    return redirect(f"redirect-{name}", expected, location, *headers, **more)


CASES = [
    *[_code(status) for status in (301, 302, 303, 307, 308)],
    # How many
    _good("four-more", "/redirect/4", number=7),
    _good("five-more", "/redirect/5", "too_many_redirects"),
    _good("itself", "/c/redirect-itself", "too_many_redirects", requests=6),
    _good("longer-and-longer", "/c/redirect-longer-and-longer/xxxxxxxx", "too_many_redirects", requests=6),
    _good("only-a-query", "?again", "too_many_redirects", requests=6),
    _good("only-a-fragment", "#here", "too_many_redirects|http_4xx", requests=6),
    _good("to-nothing", "", "http_4xx|too_many_redirects|bad_response|bad_url", requests=6),
    raw("redirect-slow-hops", "timeout", 1.2, head("302 Found", "Location: /c/redirect-slow-hops"),
        "Content-Length: 0\r\n\r\n", requests=6),
    # How they are written
    _good("absolute-path", "/ok/<number>.png"),
    _good("relative", "../ok/<number>.png"),
    _good("dots", "/a/b/../../ok/./<number>.png"),
    _good("too-many-dots", "../../../../../ok/<number>.png"),
    _good("without-scheme", "//<server>/ok/<number>.png"),
    _good("fragment", _GOOD + "#top"),
    _good("upper-case-scheme", "HTTP://<server>/ok/<number>.png"),
    _good("spaces-around", "  " + _GOOD + " \t"),
    _good("space-inside", "/ok/a b/<number>.png", "ok|bad_url"),
    _good("utf-8-inside", "/ok/снег/<number>.png", "ok|bad_url"),
    raw("redirect-latin-1-inside", "ok|bad_url", "HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: /ok/",
        b"caf\xe9", "/<number>.png\r\nContent-Length: 0\r\n\r\n"),
    _good("escaped", "/ok/caf%C3%A9%20%2525/<number>.png"),
    raw("redirect-header-in-small-letters", "ok", head("302 Found", "location:" + _GOOD), "content-length:0\r\n\r\n"),
    _good("100-kb", "/ok/" + "x" * 100_000 + "/<number>.png", "ok|bad_url|bad_response"),
    _good("long-but-legal", "/ok/" + "x" * 4_000 + "/<number>.png"),
    raw("redirect-folded", "ok|bad_response|bad_url|http_4xx", head("302 Found", "Location:", " /ok/<number>.png"),
        "Content-Length: 0\r\n\r\n"),
    raw("redirect-nul", "bad_response|bad_url", head("302 Found", "Location: /ok/\0<number>.png"),
        "Content-Length: 0\r\n\r\n"),
    _good("tab-in-scheme", "ht\ttp://<canary>/", "address_refused|bad_url|http_4xx|scheme_refused"),
    _good("backslashes", "http:\\\\<canary>\\a.png", "address_refused|bad_url|http_4xx"),
    _good("backslashes-without-scheme", "\\\\<canary>\\a.png", "address_refused|bad_url|http_4xx"),
    _good("three-slashes", "http:///<canary>/a.png", "address_refused|bad_url|dns|http_4xx"),
    _good("no-slashes", "http:<canary>", "address_refused|bad_url|http_4xx"),
    _good("without-host", "http://", "bad_url|too_many_redirects", requests=6),
    _good("half-an-ipv6", "http://[::1/", "bad_url"),
    _good("port-99999", "http://127.0.0.1:99999/", "bad_url"),
    _good("port-word", "http://127.0.0.1:http/", "bad_url"),
    _good("punycode-broken", "http://xn--a-.invalid/a.png", "bad_url|dns"),
    _good("zone-nonsense", "http://[fe80::1%2z5lo]:99@/a.png", "bad_url|credentials_in_url|address_refused"),
    _good("zone-sharp-s", "http://[fe80::1%2ß5lo]:99/a.png", "bad_url|address_refused"),
    _good("control-in-host", "http://a\x01.invalid/a.png", "bad_url|dns|bad_response"),
    _good("colons", "::::", "bad_url|scheme_refused|http_4xx"),
    _good("unknown-name", "http://nobody.invalid/a.png", "dns"),
    _good("closed-port", "http://<closed>/a.png", "connect"),
    _good("to-https", "https://<tls>/ok/1.png", "tls"),
    _good("twice-the-same", _GOOD, "ok|bad_response", "Location: " + _GOOD),
    _good("good-and-canary", _GOOD, "ok|bad_response|address_refused", "Location: " + _CANARY),
    _good("canary-and-good", _CANARY, "ok|bad_response|address_refused", "Location: " + _GOOD),
    _good("credentials", "http://user:secret@<server>/ok/1.png", "credentials_in_url"),
    _good("credentials-like-a-port", "http://user:secret/x@<server>/", "credentials_in_url|bad_url|dns"),
    _good("user-only", "http://secret@<server>/ok/1.png", "credentials_in_url"),
    _good("good-name-as-user", "http://<server>@<canary>/", "credentials_in_url"),
    _good("token-in-query", _GOOD + "?token=t0ken&sig=%2F"),
    # Where they lead
    *[
        redirect(f"redirect-to-{name}", "scheme_refused", location)
        for name, location in _OTHER_SCHEMES.items()
    ],
    *[
        redirect(f"redirect-to-{name}", "address_refused", f"http://{host}/ok/1.png")
        for name, host in _PRIVATE.items()
    ],
    _good("to-zone", "http://[fe80::1%25lo]:<cport>/", "address_refused|bad_url"),
    _good("to-fullwidth", "http://１２７.０.０.１:<cport>/", "address_refused|bad_url|dns"),
    _good("to-canary-over-https", "https://<canary>/", "address_refused"),
    _good("to-canary-twice", "/to?url=http%3A%2F%2F<canary>%2F", "address_refused"),
    # What comes with them
    _good("opted-out-on-the-way", _GOOD, "ok|opted_out", "X-Robots-Tag: noai"),
    _good("cookie", _GOOD, "ok", "Set-Cookie: id=1; Path=/", "Set-Cookie2: id=2"),
    _good("hsts", _GOOD, "ok", "Strict-Transport-Security: max-age=31536000"),
    _good("refresh-too", _GOOD, "ok", "Refresh: 0;url=http://<canary>/"),
    _good("with-picture", _GOOD, "ok", content=lambda own: b"\x89PNG" + bytes(5_000)),
    raw("redirect-endless-body", "ok|too_large", head("302 Found", "Location: " + _GOOD), "\r\n",
        Repeat(b"x" * 65_536, 100_000), sent=4 * MAX_BYTES + (32 << 20)),
    raw("redirect-silent-body", "ok|timeout", head("302 Found", "Location: " + _GOOD), "Content-Length: 10\r\n\r\n",
        30.0),
    raw("redirect-truncated-body", "ok|truncated", head("302 Found", "Location: " + _GOOD),
        "Content-Length: 5000\r\n\r\nmoved"),
    # No redirects
    served("refresh-header", "ok", "Refresh: 0;url=http://<canary>/", http_status=200),
    served("refresh-meta", "not_an_image", "Content-Type: text/html", content=lambda own: _META.replace(
        b"CANARY", own.hosts["canary"].encode())),
    served("refresh-script", "not_an_image", "Content-Type: text/html",
           content=lambda own: own.fill("<script>location='http://<canary>/'</script>").encode()),
    served("header-link-preload", "ok", "Link: <http://<canary>/a.png>; rel=preload"),
    served("header-content-location", "ok", "Content-Location: http://<canary>/a.png"),
    served("header-alt-svc", "ok", 'Alt-Svc: h3="<canary>"; ma=86400; persist=1, h2="<canary>"; ma=86400'),
    raw("redirect-in-early-hints", "ok|bad_response|address_refused",
        "HTTP/1.1 103 Early Hints\r\nLocation: http://<canary>/\r\n\r\n", head(), body(png)),
]  # fmt: skip
